"""The map of ARCHITECTURE.md, enforced: who may import whom, in Python and C++, and what no file may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "fastattn"

# Python: room -> the rooms that it may import. A room is a module or a subpackage of fastattn.
PYTHON_ARROWS: dict[str, set[str]] = {
    "__init__": {
        *(
            "functional",
            "varlen",
            "kvcache",
            "merge",
            "paged_cache",
            "explanation",
            "insights",
            "ops",
            "torch",
        ),
        *("integrations", "_config", "_threads"),
    },
    "__main__": {"cli"},
    "_core": set(),
    "_flags": set(),
    "codes": set(),
    "strided": {"codes"},
    "tensors": {"strided"},
    "arrays": {"strided", "tensors"},
    "_threads": {"_core", "arrays"},
    "vectors": {"arrays", "_flags"},
    "problem": {"vectors", "arrays"},
    "outputs": {"problem", "vectors", "arrays"},
    "cache_tensors": {"problem", "outputs", "arrays", "codes"},
    "cache_problem": {"cache_tensors", "problem", "vectors", "arrays", "_flags"},
    "philox": set(),
    "reference": {"cache_problem", "problem", "arrays", "codes", "philox"},
    "gpu": {"problem", "outputs", "arrays", "cache_problem", "_flags"},
    "backends": {
        *("problem", "outputs", "vectors", "arrays", "cache_problem", "codes", "reference", "philox", "gpu"),
        *("_core", "_flags", "_threads", "tensors"),
    },
    "dispatch": {"backends", "problem", "arrays"},
    "gradients": {"backends", "problem", "outputs", "arrays"},
    "torch_ops": {
        *("tensors", "gradients", "dispatch", "backends", "problem", "vectors", "outputs", "arrays"),
        *("cache_problem", "cache_tensors"),
    },
    "torch": {"torch_ops"},
    "observers": {"problem"},
    "functional": {"torch_ops", "dispatch", "problem", "outputs", "arrays", "observers"},
    "kvcache": {"torch_ops", "dispatch", "cache_problem", "outputs", "arrays", "problem", "observers"},
    "varlen": {"functional", "problem", "arrays"},
    "ops": {"functional", "torch_ops", "gradients", "dispatch", "problem", "arrays"},
    "merge": {"problem", "arrays"},
    "page_table": set(),
    "page_pool": {"problem", "arrays", "codes"},
    "paged_cache": {"page_pool", "page_table", "problem", "vectors", "arrays"},
    "explanation": {"dispatch", "problem", "arrays"},
    "insights": {"torch_ops", "dispatch", "backends", "outputs", "problem", "vectors", "arrays"},
    "_config": {"_core", "_threads", "backends", "dispatch"},
    "nn": {"functional", "tensors"},
    "compare": {"nn", "_core", "_threads"},
    "integrations": {
        *("functional", "varlen", "backends", "kvcache", "paged_cache", "problem", "vectors", "arrays"),
        *("observers", "tensors"),
    },
    "viz": {"functional", "insights", "problem", "strided", "vectors", "codes", "integrations"},
    "demo": {"__init__", "integrations", "viz"},
    "cli": {"__init__", "_config", "_core", "compare", "demo", "integrations", "viz"},
}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything that `path` imports at run time, lazily or not."""
    package = ["fastattn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from fastattn import problem` names a module, `from fastattn.problem import X` something in it.
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk `tree` but for the bodies of `if TYPE_CHECKING:`, which no run ever sees."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imported_modules(path):
        first, *rest = name.split(".")
        if first == "fastattn":
            rooms.add(rest[0] if rest and rest[0] in PYTHON_ARROWS else "__init__")
    return rooms


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in PYTHON_ARROWS, f"{path.name} has no place on the map: add it here and to ARCHITECTURE.md"
    extra = imported_rooms(path) - PYTHON_ARROWS[room] - {room}
    assert not extra, f"{room} must not import {sorted(extra)}"


def test_python_arrows_have_no_circle() -> None:
    assert_no_circle({room: arrows - {"__init__"} for room, arrows in PYTHON_ARROWS.items()})


def test_reference_imports_no_kernel() -> None:
    names = {name.split(".")[0] for name in imported_modules(PACKAGE / "reference.py")}
    assert names <= {"__future__", "numpy", "fastattn", "math", "typing", "collections", "dataclasses"}
    assert imported_rooms(PACKAGE / "reference.py").isdisjoint({"_core", "backends", "gpu"})


def test_import_does_not_bring_torch() -> None:
    heavy = {"torch", "triton", "matplotlib", "plotly", "transformers", "rich"}
    code = f"import sys, fastattn; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# C++: dispatch.h is the table that tiers fill; dispatch.cpp chooses among them. The arrow from dispatch.cpp
# to the tiers is a call of their register functions, not an include. How 16-bit and 8-bit numbers are stored
# (algorithm/half.h, bytes.h), dropout's random numbers and the choice of the largest scores (top_keys.h) are
# all that the scalar oracle shares with the kernels it is an oracle of, beside memory and threads.
CPP_ARROWS: dict[str, set[str]] = {
    "params": set(),
    "cpu_features": set(),
    "crew": set(),
    "parallel": {"crew"},
    "workspace": set(),
    "top_keys": set(),
    "half": set(),
    "dropout": {"params"},
    "table": {"params"},
    "scalar": {"params", "half", "dropout", "table", "parallel", "workspace", "top_keys"},
    "algorithm": {"params", "half", "dropout", "parallel", "workspace", "top_keys"},
    "isa": {"algorithm", "params", "half", "table"},
    "dispatch": {"table", "cpu_features"},
    "peak": {"table", "parallel", "workspace"},
    "cache_update": {"params", "half", "parallel"},
    "bindings": {"cache_update", "table", "params", "peak", "cpu_features", "parallel", "workspace"},
}
KERNEL_ROOMS = {"params", "half", "dropout", "algorithm", "isa", "scalar"}


def cpp_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp"})


def cpp_room(path: Path) -> str:
    relative = path.relative_to(CSRC)
    shared = {"dispatch.h": "table", "half.h": "half", "bytes.h": "half"}
    if relative.name in shared:
        return shared[relative.name]
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def included_files(path: Path) -> Iterator[Path]:
    """The files of csrc/ that `path` includes."""
    for name in includes(path):
        for base in (path.parent, CSRC):
            if (base / name).is_file():
                yield (base / name).resolve()
                break


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def cpp_id(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.parametrize("path", cpp_files(), ids=cpp_id)
def test_cpp_includes_follow_the_arrows(path: Path) -> None:
    room = cpp_room(path)
    assert room in CPP_ARROWS, f"{cpp_id(path)} has no place on the map: add it here and to ARCHITECTURE.md"
    extra = {cpp_room(file) for file in included_files(path)} - CPP_ARROWS[room] - {room}
    assert not extra, f"{room} must not include {sorted(extra)}"


def test_cpp_arrows_have_no_circle() -> None:
    assert_no_circle(CPP_ARROWS)


@pytest.mark.parametrize("path", cpp_files(), ids=cpp_id)
def test_only_bindings_know_python(path: Path) -> None:
    python = [name for name in includes(path) if name == "Python.h" or name.startswith("pybind11")]
    assert not python or cpp_room(path) == "bindings"


@pytest.mark.parametrize("path", cpp_files(), ids=cpp_id)
def test_only_parallel_names_openmp(path: Path) -> None:
    named = re.search(r"omp\.h|#\s*pragma\s+omp|_OPENMP|\bomp_\w+\(", without_comments(path))
    assert not named or cpp_room(path) == "parallel", named


ALLOCATION = re.compile(
    r"\b(?:malloc|calloc|realloc|aligned_alloc|posix_memalign|_mm_malloc|mmap)\s*\(|\bnew\b"
    r"|std::(?:vector|string|function|map|deque|list|unique_ptr|shared_ptr|make_unique|make_shared)\b"
)


@pytest.mark.parametrize("path", [p for p in cpp_files() if cpp_room(p) in KERNEL_ROOMS], ids=cpp_id)
def test_kernels_lease_their_scratch(path: Path) -> None:
    """From workspace.*; the kernels allocate nothing else, and use no container that would."""
    assert not ALLOCATION.findall(without_comments(path))


@pytest.mark.parametrize("path", [p for p in cpp_files() if cpp_room(p) != "isa"], ids=cpp_id)
def test_only_isa_rooms_use_intrinsics(path: Path) -> None:
    """The algorithm and everything around it compile for any CPU."""
    assert not [name for name in includes(path) if name.endswith("intrin.h") or name == "arm_neon.h"]


def assert_no_circle(arrows: dict[str, set[str]]) -> None:
    remaining = {room: set(targets) for room, targets in arrows.items()}
    while remaining:
        leaves = {room for room, targets in remaining.items() if not targets & remaining.keys()}
        assert leaves, f"a circle among {sorted(remaining)}"
        remaining = {room: targets for room, targets in remaining.items() if room not in leaves}
