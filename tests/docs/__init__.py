"""The pages: what is generated in them, and whether they say what is there."""
