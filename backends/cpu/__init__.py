"""The cpu backend: x86-64, from generated C++."""
