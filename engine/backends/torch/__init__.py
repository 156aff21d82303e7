"""The torch backend: every device that torch has, no kernels of our own."""
