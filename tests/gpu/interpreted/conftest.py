"""In a process of its own, started by ../test_interpreted.py: kernels are interpreted, on CPU tensors."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget

from interpreter import mend, use_target

mend()
use_target(GPUTarget("cuda", 90, 32))
