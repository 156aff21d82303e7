"""Kernels for CUDA devices, written in Triton; they also run in its interpreter, for tests."""
