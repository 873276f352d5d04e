"""Kernels of our own for NVIDIA GPUs, in Triton: where the operators of PyTorch would read and
write the same memory many times over.

One file for each, with a reference in plain PyTorch for the tests. Where kernels cannot run, the
rules take PyTorch's operators in ways that suit CPUs; roots take the references. Triton is imported
when a kernel is launched for the first time.
"""
