"""Triton kernels for GPUs, Gluon kernels for Hopper. The package itself needs neither torch nor triton."""
