"""The evaluation container: scores an adapter of the results volume."""
