"""The native backend: runs our C++ kernels on a CPU, in bfloat16."""
