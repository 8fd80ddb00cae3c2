"""The Flower app: all that travels to the sites. It imports nothing else of this repository."""
