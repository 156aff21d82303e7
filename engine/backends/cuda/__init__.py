"""The CUDA backend: Triton kernels, streams, graphs, asynchronous steps."""
