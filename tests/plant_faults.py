"""Plants each fault of faults.py in a copy of the sources, builds it, and runs the tests until one fails.

python tests/plant_faults.py            all of them: about an hour
python tests/plant_faults.py NAME ...   some
python tests/plant_faults.py --list

Exits with 1 if a fault goes unnoticed, or if a test that noticed one fails without it as well.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from build_tree import ROOT, build_tree, check_imports, environment
from fastattn import _core
from faults import FAULTS, Fault
from faults_gpu import GPU_FAULTS

SCRATCH = ROOT / "build" / "faults"
SOURCE = SCRATCH / "source"
COPIED = (
    "CMakeLists.txt",
    "pyproject.toml",
    "csrc",
    "python",
    "tests",
    "bench",
    "gpu_check",
    "docs",
    "Makefile",
)
TIMEOUT = 300  # seconds; a test that hangs is red too


def copy_sources() -> None:
    """Bring the copy up to date; what has not changed keeps its time, so that it need not be built again."""
    wanted = {path for name in COPIED for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()}
    wanted = {path.relative_to(ROOT) for path in wanted if "__pycache__" not in path.parts}
    for old in [
        path for path in SOURCE.rglob("*") if path.is_file() and path.relative_to(SOURCE) not in wanted
    ]:
        old.unlink()
    for name in wanted:
        here, there = ROOT / name, SOURCE / name
        if not there.exists() or here.read_bytes() != there.read_bytes():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)


def planted(fault: Fault) -> str:
    """The file's text with the fault in it; fails where the source has moved on."""
    text = (ROOT / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} holds {text.count(fault.old)} times: {fault.old}")
    return text.replace(fault.old, fault.new)


def build(tier: str) -> Path:
    # One tier is enough for a fault, and a fraction of the time; so is code that is hardly optimised.
    tree = build_tree(SOURCE, SCRATCH / tier, f"-DFASTATTN_ISAS={tier}", "-DFASTATTN_OPTIMISE=1")
    check_imports(tree, environment(tree))
    return tree


def run_tests(tree: Path, *arguments: str) -> tuple[bool, str]:
    """Whether the tests passed, and the first that did not."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    variables = environment(tree)
    if interpreted(*arguments):
        variables["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            command, cwd=SOURCE, env=variables, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return False, "a test that did not end"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return False, failed[1]
    if done.returncode < 0:
        return False, f"a process that ended by signal {-done.returncode}"
    if done.returncode:
        raise RuntimeError(f"pytest could not run: {(done.stdout + done.stderr)[-3000:]}")
    return True, ""


def interpreted(*tests: str) -> bool:
    """Whether tests are of the kernels for GPUs, which Triton has to interpret."""
    return any(test.startswith("tests/gpu/interpreted/") for test in tests)


def try_fault(fault: Fault) -> str:
    """The test that noticed it; "" if none did."""
    path = SOURCE / fault.file
    original = path.read_text()
    try:
        path.write_text(planted(fault))
        tree = build(fault.tier)
        first = fault.files()
        passed, caught = run_tests(tree, *first)
        if passed and not interpreted(*first):  # all the rest, but for what builds and reads documents
            left_out = [
                f"--ignore=tests/test_{name}.py" for name in ("build", "docs", "faults", "spills", "exp2")
            ]
            passed, caught = run_tests(tree, "tests", *left_out, *(f"--ignore={name}" for name in first))
        return "" if passed else caught
    finally:
        path.write_text(original)


def check_without(caught: dict[Fault, str]) -> list[str]:
    """The tests that noticed a fault, on the sources as they are; those that fail there too."""
    wrong = []
    for tier, on_gpu in sorted({(fault.tier, interpreted(test)) for fault, test in caught.items()}):
        tests = sorted(
            {
                test
                for fault, test in caught.items()
                if fault.tier == tier and interpreted(test) == on_gpu and "::" in test
            }
        )
        passed, failed = run_tests(build(tier), *tests)
        wrong += [] if passed else [failed]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    known = {fault.name: fault for fault in (*FAULTS, *GPU_FAULTS)}
    if options.list:
        print("\n".join(known))
        return 0
    if unknown := set(options.names) - set(known):
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    copy_sources()
    caught: dict[Fault, str] = {}
    unnoticed = 0
    for name in options.names or known:
        fault = known[name]
        if fault.tier not in _core.available_isas():
            print(f"{name:26} not tried: this CPU has no {fault.tier}", flush=True)
            continue
        start = time.monotonic()
        if test := try_fault(fault):
            caught[fault] = test
        else:
            unnoticed += 1
        print(f"{name:26} {test or 'NOT NOTICED'}  ({time.monotonic() - start:.0f} s)", flush=True)
    wrong = check_without(caught)
    print(f"{len(caught)} noticed, {unnoticed} not; without a fault {wrong or 'these tests pass'}")
    return 1 if unnoticed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
