"""What the build makes: object files, the linked extension, the metadata of the package."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import _core

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def test_build_flags_keep_floating_point_honest() -> None:
    cmake = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert not re.findall(r"-ffast-math|-Ofast|-march=native|-flto|-funsafe-math\S*", cmake)


def test_every_isa_folder_is_built() -> None:
    built = set(re.findall(r"fastattn_add_isa\((\w+) ", (ROOT / "CMakeLists.txt").read_text()))
    assert built == {path.parent.name for path in CSRC.glob("isa/*/kernels.cpp")}


def tool_output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def isa_objects() -> list[Path]:
    objects = sorted((ROOT / "build" / "editable").rglob("isa/*/kernels.cpp.o"))
    if not objects:
        pytest.skip("no object files here: the package was not built by `make`")
    return objects


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) as nm prints them."""
    lines = tool_output("nm", "-C", "--defined-only", str(path)).splitlines()
    return [(kind, name) for _, kind, name in (line.split(maxsplit=2) for line in lines)]


def test_isa_objects_define_no_weak_symbol() -> None:
    """Of a weak symbol the linker keeps one copy: AVX-512 code could end up in an AVX2 machine's hands."""
    for path in isa_objects():
        # The reference to the unwinder's personality routine is a pointer, the same in every object.
        weak = {name for kind, name in defined_symbols(path) if kind in "VWuvw"}
        assert not {name for name in weak if not name.startswith("DW.ref.")}, path.parent.name


def test_isa_objects_define_one_entry() -> None:
    for path in isa_objects():
        exported = [name.split("(")[0] for kind, name in defined_symbols(path) if kind in "TDBR"]
        assert exported == [f"fastattn::register_{path.parent.name}"]


def test_isa_objects_run_nothing_at_load() -> None:
    """A global constructor would run before the CPU has been asked what it can do."""
    for path in isa_objects():
        sections = tool_output("readelf", "-SW", str(path))
        assert not re.findall(r"\.(?:init_array|ctors)\S*", sections), path.parent.name


def test_extension_links_libgomp_by_its_plain_name() -> None:
    if sys.platform != "linux":
        pytest.skip("the SONAME rule is Linux's")
    dynamic = tool_output("readelf", "-dW", str(_core.__file__))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if "torch" in name or "python" in name or "c10" in name]
    assert not re.findall(r"RPATH|RUNPATH", dynamic)


def test_scalar_tier_compiles_for_aarch64() -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross-compiler: apt install g++-aarch64-linux-gnu")
    done = subprocess.run(["make", "-C", str(ROOT), "check-aarch64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("order", ["torch, fastattn", "fastattn, torch"])
def test_one_openmp_runtime_beside_torch(order: str) -> None:
    pytest.importorskip("torch")
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    code = f"""
import {order}, pathlib
x = torch.ones(1, 4, 64, 32)
assert torch.equal(fastattn.attention(x, x, x), x) and (x @ x.mT)[0, 0, 0, 0] == 32
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(len({{line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stdout + done.stderr


def test_numpy_is_the_only_dependency() -> None:
    requirements = importlib.metadata.requires("fastattn") or []
    required = [line for line in requirements if "extra ==" not in line]
    assert [re.split(r"[<>=~ ]", line)[0] for line in required] == ["numpy"]


def test_torch_is_no_build_requirement() -> None:
    build = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert build is not None
    assert "torch" not in build[1]
