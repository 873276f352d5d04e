"""Kernels of our own for NVIDIA GPUs, in Triton: where the operators of PyTorch would read and
write the same memory many times over.

Where kernels cannot run, the rules take PyTorch's operators in ways that suit CPUs, and roots the
references beside the kernels; references of the others stand in the tests. Triton is imported
when a kernel is launched for the first time.
"""
