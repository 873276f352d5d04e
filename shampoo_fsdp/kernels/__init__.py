"""Kernels of our own for NVIDIA GPUs, in Triton: where the operators of PyTorch would read and
write the same memory many times over.

One file for each, with the same in plain PyTorch: that is taken on other devices, for other types,
and where Triton is missing. Triton is imported when a kernel is launched for the first time.
"""
