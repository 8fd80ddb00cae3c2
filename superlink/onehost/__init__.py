"""A whole federation as processes on this host: the demo, the tests and the benchmarks."""
