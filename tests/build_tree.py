"""Builds the extension with options of one's own, beside the installed one: a folder to put on PYTHONPATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# An editable install finds the package before PYTHONPATH is looked at. Runs as every interpreter starts.
STEP_ASIDE = """\
import sys

editable = "ScikitBuildRedirectingFinder"
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != editable]
"""


# The tools of the interpreter's environment first.
SEARCHED = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def run(*command: str) -> None:
    """Quietly, unless it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": SEARCHED})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")


def build_tree(source: Path, build: Path, *defines: str) -> Path:
    """Build the sources in `source`; the folder that holds the package `fastattn` made of them."""
    import pybind11

    options = [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *defines,
    ]
    run("cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *options)
    run("cmake", "--build", str(build), "--target", "_core", "--", "--quiet")
    tree = build / "tree"
    package = tree / "fastattn"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(source / "python" / "fastattn", package, ignore=shutil.ignore_patterns("__pycache__"))
    (built,) = build.glob("_core.*.so")
    shutil.copy(built, package)
    (tree / "sitecustomize.py").write_text(STEP_ASIDE)
    return tree


def environment(tree: Path) -> dict[str, str]:
    """Variables under which a new interpreter imports the package from `tree`."""
    return os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def check_imports(tree: Path, variables: dict[str, str]) -> None:
    """Fail if another build would be imported."""
    code = "import fastattn, fastattn._core as core; print(fastattn.__file__, core.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    if [Path(path).parent for path in done.stdout.split()] != [tree / "fastattn"] * 2:
        raise RuntimeError(f"not the build in {tree}: {done.stdout}{done.stderr}")
