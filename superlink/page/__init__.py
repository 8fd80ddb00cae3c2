"""What goes on in the runs, as a page, as a file, and for Prometheus."""
