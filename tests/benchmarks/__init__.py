"""Speed claims: each script measures us and the alternative in one run and prints the ratio."""
