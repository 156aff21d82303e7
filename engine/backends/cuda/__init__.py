"""The CUDA backend: computes steps asynchronously with Triton kernels, streams and graphs."""
