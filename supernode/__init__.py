"""A hospital's side: preparing the base model and the data, and the SuperNode itself."""
