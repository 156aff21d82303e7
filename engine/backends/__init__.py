"""What executes batches: one Runner protocol, one folder for each way to compute."""
