"""Triton kernels: templates, schedules, and compiling them ahead of time for a GPU."""
