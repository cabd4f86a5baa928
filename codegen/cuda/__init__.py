"""CUDA C++ kernels: intrinsics, two families of templates, and compiling them for a GPU."""
