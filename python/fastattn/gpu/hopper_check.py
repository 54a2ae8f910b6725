"""Whether a device may be trusted with the Hopper kernels: each kind is tried on it before it is used.

A wrong kernel may hang, or leave the process without its CUDA context, so the trial runs in a child with a
time limit. Its verdict is kept in a file under ``FASTATTN_CACHE_DIR`` (default ``$XDG_CACHE_HOME/fastattn``
or ``~/.cache/fastattn``) whose name depends on the device, its driver, torch, Triton and the source of the
kernels. A child that could not run leaves none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

LIMIT = 120  # seconds for a child: imports, a compilation of a few seconds a kernel, milliseconds of work
WRONG = 3  # a child's exit code if results are wrong

_lock = threading.Lock()
_verdicts: dict[tuple[str, int, str], str] = {}  # (kind, head_dim, device) -> why it is not to be used, or ""


def refusal(kind: str, head_dim: int, device: torch.device) -> str | None:
    """Say why `kind` ("forward" or "backward") is not to be used for `head_dim` on `device`; None if it may.

    While a CUDA graph is being captured no trial is started: without a verdict the answer is no, for now.
    """
    name = (kind, head_dim, torch.cuda.get_device_name(device))
    with _lock:
        if name not in _verdicts:
            path = _cache_directory() / f"hopper-{_key(*name, device)}"
            verdict = _read(path)
            if verdict is None and torch.cuda.is_current_stream_capturing():
                return "the device self-test has not run yet, and cannot while a CUDA graph is captured"
            if verdict is None:
                verdict, lasting = _try(kind, head_dim, device)
                if lasting:
                    _write(path, verdict)
            if verdict:
                warnings.warn(
                    f"The Hopper {kind} for head_dim {head_dim} is not used, another kernel runs: {verdict}. "
                    f"The verdict is for this process, or kept in {path}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _verdicts[name] = verdict
        return _verdicts[name] or None


def _try(kind: str, head_dim: int, device: torch.device) -> tuple[str, bool]:
    """Run a trial: what is wrong ("" if nothing), and whether that will be so the next time."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = [sys.executable, "-m", "fastattn.gpu.hopper_trial", kind, str(head_dim), str(index)]
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, timeout=LIMIT, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"its self-test did not end within {LIMIT} seconds", True
    except OSError as error:
        return f"its self-test could not be started: {error}", False
    if done.returncode == 0:
        return "", True
    if done.returncode == WRONG:  # the reason is what it printed; warnings of torch are no reason
        return f"its self-test failed: {_last_line(done.stdout)}", True
    return f"its self-test ended with exit code {done.returncode}: {_last_line(done.stderr)}", False


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _key(kind: str, head_dim: int, name: str, device: torch.device) -> str:
    import triton

    driver = Path("/proc/driver/nvidia/version")
    facts = [
        *(kind, str(head_dim), name, str(torch.cuda.get_device_capability(device))),
        *(torch.__version__, triton.__version__),
        driver.read_text() if driver.exists() else str(torch.version.cuda),
    ]
    digest = hashlib.sha256("\n".join(facts).encode())
    for source in sorted(Path(__file__).parent.glob("hopper*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _cache_directory() -> Path:
    if given := os.environ.get("FASTATTN_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _write(path: Path, verdict: str) -> None:
    """Keep a verdict whole or not at all; a cache that cannot be written costs the next process a trial."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(verdict)
        os.replace(file.name, path)
