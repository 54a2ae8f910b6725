"""Peers in processes of their own, seen from the process that measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path
from socket import socketpair
from types import TracebackType
from typing import Any

from bench.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent
# `make bench-peers` builds it beside the environment of the project.
PEER_PYTHON = Path(sys.prefix).with_name(Path(sys.prefix).name + "-peers") / "bin" / "python"
# Has torch ask for huge pages for large tensors, as NumPy's arrays and `PagedKVCache` do.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
_SECONDS = 300.0  # the longest answer: compilers, and models that are loaded


class PeerError(Exception):
    """Why a peer could not do what it was asked."""


class Worker:
    """One peer, alive."""

    def __init__(self, peer: str, threads: int, isa: str = "") -> None:
        python = Path(sys.executable) if PEERS[peer].at_home else PEER_PYTHON
        if not python.exists():
            raise PeerError("not installed: `make bench-peers`")
        ours, theirs = socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [str(python), "-m", "bench.worker", peer, str(threads), str(theirs.fileno())],
                cwd=ROOT,
                env=_environment(threads, isa),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what libraries have to say would break into the table
                stderr=subprocess.DEVNULL,
            )
        self._connection = connection.Connection(ours.detach())
        try:
            self.version: str = self.ask("load")
        except PeerError as error:
            self.close()
            missing = "No module named" in str(error) and not PEERS[peer].at_home
            raise PeerError("not installed: `make bench-peers`" if missing else str(error)) from error

    def ask(self, what: str, *arguments: Any) -> Any:
        """Have `bench.worker` do something and wait for the answer."""
        try:
            self._connection.send((what, arguments))
            if not self._connection.poll(_SECONDS):
                self.close()
                raise PeerError(f"no answer in {_SECONDS:.0f} s")
            status, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise PeerError(self._last_words()) from error
        if status == "raised":
            raise PeerError(answer)
        return answer

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process; harmless when it has ended."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        code = self._process.wait(10)
        return f"its process died: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


class Workers:
    """Workers started when first needed, and the reasons of those that could not be."""

    def __init__(self) -> None:
        self._alive: dict[tuple[str, int, str], Worker] = {}
        self.reasons: dict[tuple[str, int, str], str] = {}
        self.versions: dict[str, str] = {}

    def get(self, peer: str, threads: int, isa: str = "") -> Worker:
        """Return the worker of a peer on so many threads, in a tier; PeerError if it cannot be had."""
        key = peer, threads, isa
        if key in self.reasons:
            raise PeerError(self.reasons[key])
        if key not in self._alive:
            try:
                self._alive[key] = Worker(*key)
            except PeerError as error:
                self.reasons[key] = str(error)
                raise
            self.versions[peer] = self._alive[key].version
        return self._alive[key]

    def discard(self, worker: Worker) -> None:
        """Drop one that died or hangs, so that the next row starts another."""
        worker.close()
        self._alive = {key: other for key, other in self._alive.items() if other is not worker}

    def forget(self) -> None:
        """Have every worker free what it prepared."""
        for worker in list(self._alive.values()):
            try:
                worker.ask("forget")
            except PeerError:
                self.discard(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._alive.values():
            worker.close()


def huge_pages() -> bool:
    """Whether workers ask for huge pages: unless the user's environment says otherwise."""
    return (_HUGE_PAGES | dict(os.environ)).items() >= _HUGE_PAGES.items()


def _environment(threads: int, isa: str) -> dict[str, str]:
    """The user's, and what says how many threads and which tier, and asks for huge pages."""
    tier = {"FASTATTN_ISA": isa} if isa else {}
    own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {**_HUGE_PAGES, **os.environ, **own, **tier}
