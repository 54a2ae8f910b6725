"""exp2 of every tier against the exact powers, in C++ (tests/cpp/exp2_test.cpp says what is demanded)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_tree import ROOT, SEARCHED, run
from fastattn import _core

BUILD = ROOT / "build" / "cpp"


@pytest.fixture(scope="module")
def program() -> Path:
    """The test, built; a few seconds the first time."""
    for name in ("cmake", "ninja"):
        if shutil.which(name, path=SEARCHED) is None:
            pytest.skip(f"{name} is not installed: the C++ tests cannot be built")
    options = ("-DFASTATTN_BINDINGS=OFF", "-DFASTATTN_TESTS=ON")
    run("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *options)
    run("cmake", "--build", str(BUILD), "--target", "exp2_test", "--", "--quiet")
    return BUILD / "tests" / "cpp" / "exp2_test"


def check(program: Path, step: int) -> None:
    done = subprocess.run([str(program), str(step)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    tiers = set(_core.compiled_isas()) - {"scalar"}
    reported = set(re.findall(r"^(\w+)[: ]", done.stdout, re.MULTILINE))
    assert tiers <= reported, "every tier is tried or reported as one that this CPU lacks"
    seen = {int(count) for count in re.findall(r"0 of (\d+) out of bounds$", done.stdout, re.MULTILINE)}
    assert max(seen, default=2**32 // step) >= 2**32 // step


def test_every_hundredth_float(program: Path) -> None:
    check(program, 101)


@pytest.mark.slow
def test_every_float(program: Path) -> None:
    check(program, 1)
