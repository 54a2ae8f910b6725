"""Triton kernels for GPUs, and Gluon kernels for Hopper. The package itself needs neither torch nor triton."""
