"""Build the package, check it on the GPU, time it: ``python -m gpu_check --out FOLDER``.

Exits with 1 where something was wrong, with 2 where there is nothing to run on.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu_check.build import SCRATCH


def main(arguments: list[str]) -> int:
    """Run it, or say in a sentence why it cannot be run here."""
    options = _parser().parse_args(arguments)
    if (missing := what_is_missing(options.rehearse)) is not None:
        print(f"gpu-check: {missing}")
        return 2
    from gpu_check.session import Session, names  # they need torch

    if options.list:
        print("\n".join(names()))
        return 0
    return Session(options).run()


def what_is_missing(rehearse: bool) -> str | None:
    """Why nothing can be run here."""
    if find_spec("torch") is None:
        return "there is no torch here; it needs torch, built for CUDA, and Triton."
    import torch

    if rehearse:
        return None
    if not torch.cuda.is_available():
        return f"there is no CUDA GPU here that torch {torch.__version__} can use."
    if find_spec("triton") is None:
        return "there is no Triton here, which compiles the kernels: pip install 'fastattn[triton]'."
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=SCRATCH / "report", help="a folder (default: build/gpu-check/report)")
    add("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="groups of checks, or rows by their labels; * and ? match")
    add("--list", action="store_true", help="print what --only can name")
    add("--seed", type=int, help="of the inputs, which are drawn anew by default")
    add("--no-build", action="store_true", help="use the fastattn that this Python finds")
    add("--rehearse", action="store_true", help="small, on the CPU: tries the script alone")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
