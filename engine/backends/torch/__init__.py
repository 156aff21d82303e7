"""The torch backend: runs on every device that torch supports, without our own kernels."""
