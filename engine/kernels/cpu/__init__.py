"""Native kernels for x86-64 CPUs: C++ with a plain C ABI, called through ctypes."""
