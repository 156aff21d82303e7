"""The native backend: our C++ kernels on a CPU, bfloat16."""
