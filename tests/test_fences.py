"""The fences of fences.py stop what they should: otherwise what is run between them proves nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import bounds
import fastattn as fa
from fences import Place, extent, fenced
from kernels import Kernel, assert_same_bits
from shapes import Case

CASE = Case("fenced", 6, 70, 17, 33, query_heads=4, kv_heads=2, causal=True, arrays=("mask", "bias", "sinks"))


@pytest.mark.parametrize("place", ["end", "start"])
def test_results_come_through(kernel: Kernel, place: Place) -> None:
    arguments, options = bounds.draw(CASE, kernel.dtype), CASE.options(kernel.dtype)
    options |= {"return_lse": True, "return_weights": True}
    expected = fa.attention(*arguments, **options)
    with fenced(place) as fences:
        assert_same_bits(fa.attention(*arguments, **options), expected)
    assert fences.calls == 1


def test_extent_reaches_to_the_last_byte() -> None:
    x = np.zeros((3, 5, 7), np.float32)[::2, ::2, ::3]
    strides = tuple(step // 4 for step in x.strides)
    assert extent((0, 0, x.shape, strides)) == (2 * 35 + 4 * 7 + 6 + 1) * 4
    assert extent((0, 0, (4, 0), (0, 1))) == 0


@pytest.mark.parametrize("place, offset", [("end", "size"), ("start", "-1")])
@pytest.mark.parametrize("access", ["read", "write", "write an input"])
def test_a_stray_access_ends_the_process(place: str, offset: str, access: str) -> None:
    size = 5000
    stray = {
        "read": f"ctypes.string_at(fence.address + {offset}, 1)",
        "write": f"ctypes.memset(fence.address + {offset}, 0, 1)",
        "write an input": "ctypes.memset(fence.address, 0, 1)",
    }[access]
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ctypes
        import numpy as np
        from fences import Fence

        size = {size}
        source = np.arange(size, dtype=np.uint8)
        fence = Fence(source.ctypes.data, size, {place!r}, writable={access != "write an input"})
        assert ctypes.string_at(fence.address, size) == source.tobytes()
        print("inside", flush=True)
        {stray}
        print("outside")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "inside\n" and done.returncode < 0, done.stdout + done.stderr
