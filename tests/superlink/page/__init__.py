"""The page: what it reads, shows and refuses."""
