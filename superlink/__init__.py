"""The coordinator's side: certificates and keys, the SuperLink, and submitting runs."""
