"""Execute batches: one Runner protocol, and a folder for each backend behind it."""
