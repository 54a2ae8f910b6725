"""The process of one peer: ``python -m bench.worker PEER THREADS SOCKET`` answers what `bench.workers` asks.

A peer has a process to itself, so that neither its threads, its patches to torch nor its crash reach another.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench import gradients, work
from bench.peers import PEERS, Call, Peer
from bench.peers.base import Run
from tests.shapes import Case

# A turn is timed in batches long beside the clock's resolution.
_BATCH_SECONDS = 2e-3
_LONG = 0.1  # seconds of a call that needs no warming up


class Worker:
    """Prepared calls by number, and the requests that a parent may make."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.runs: dict[int, Run] = {}
        self.repeats: dict[int, int] = {}
        self.floors: dict[int, Callable[[], float]] = {}

    def prepare(
        self, number: int, case: Any, dtype: str, mode: str, library: str = "torch", cold: bool = False
    ) -> tuple[str, Any]:
        """("refused", why), or ("ready", the outcome of a first call: an output, or arrays by name)."""
        if reason := self.refuses(case, dtype, mode):
            return "refused", reason
        if not isinstance(case, Case):
            run, read = case.prepare(self.peer.name, dtype, mode)
        elif mode != "forward":
            run, read = gradients.prepare(self.peer, draw_to_differentiate(case, dtype), mode)
        else:
            kept = library if self.peer.name == "fastattn" else self.peer.library
            copies = work.copies_that_no_cache_holds(work.kv_bytes(case, dtype)) if cold else 1
            calls = list(draw(case, dtype, kept, copies))
            run = _rotate([self.peer.prepare(call) for call in calls])
            if cold and kept == "torch" and self.peer.name == "fastattn" and not case.arrays:
                self.floors[number] = partial(_time_of_reading, calls)
            read = partial(self.peer.read, case=case)
        outcome = read(run())  # the first copy's, which has the oracle's numbers
        self.runs[number] = run
        return "ready", outcome

    def refuses(self, case: Any, dtype: str, mode: str) -> str:
        """Why the peer cannot do it; "" where it can."""
        if not isinstance(case, Case):
            return "" if self.peer.name in case.peers else f"done by {', '.join(case.peers)} alone"
        if mode != "forward" and not self.peer.differentiates:
            return "no backward"
        return self.peer.refuses(case, dtype)

    def sample(self, number: int, seconds: float) -> tuple[float, float, float]:
        """Median seconds of a call over a turn of about `seconds`, CPU time over wall time, and the floor.

        The floor is how long it takes to read keys and values alone, 0 where that is not what bounds a call.
        """
        run = self.runs[number]
        if number not in self.repeats:
            self.repeats[number] = _repeats(run)
        repeats = self.repeats[number]
        if repeats > 1 or _time(run, 1) < _LONG:
            _time(run, max(1, repeats // 4))
        cpu, wall, batches = time.process_time(), time.perf_counter(), []
        while not batches or sum(batches) < seconds:
            batches.append(_time(run, repeats))
        cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
        floor = self.floors[number]() if number in self.floors else 0.0
        return statistics.median(batches) / repeats, cores, floor

    def forget(self) -> None:
        self.runs.clear()
        self.repeats.clear()
        self.floors.clear()


def draw(case: Case, dtype: str, library: str, copies: int = 1) -> Iterator[Call]:
    """The oracle's numbers, bit by bit, whatever rounds in `library`; then the same in other places."""
    tensors, options = case.tensors(dtype), case.options(dtype)
    for name in set(options) - {"causal", "window", "softcap"}:
        options[name] = _convert(options[name], library)
    for copy in range(copies):
        query, key, value = (_convert(np.roll(array, copy, axis=2), library) for array in tensors)
        yield Call(case, dtype, query, key, value, options)


def draw_to_differentiate(case: Case, dtype: str) -> Call:
    """The same call with a graph of torch, and what its backward starts from."""
    (call,) = draw(case, dtype, "torch")
    for tensor in (call.query, call.key, call.value):
        tensor.requires_grad_()
    return replace(call, grad_out=_convert(case.grad_out(dtype), "torch"))


def _convert(array: np.ndarray, library: str) -> Any:
    """An array of `library`, in memory of its own: tensors begin with a line of the caches, arrays do not."""
    if library != "torch":
        return array
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).clone().view(torch.bfloat16)
    return torch.from_numpy(array).clone()


def _time_of_reading(calls: Sequence[Call]) -> float:
    """Seconds in which the keys and values of a call are read once: the median over all copies."""
    from fastattn import _core, get_num_threads

    def seconds(tensor: Any) -> float:
        return _core.read_once(tensor.data_ptr(), tensor.nbytes, get_num_threads())

    return statistics.median(seconds(call.key) + seconds(call.value) for call in calls)


def _rotate(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    following = itertools.cycle(runs).__next__
    return lambda: following()()


def _repeats(run: Run) -> int:
    """How many calls make a batch that is long enough to be timed."""
    count = 1
    while (elapsed := _time(run, count)) < _BATCH_SECONDS:
        count = max(2 * count, int(count * _BATCH_SECONDS / max(elapsed, 1e-7)))
    return count


def _time(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def _answer(request: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", request(*arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return "raised", f"{type(error).__name__}: {lines[0][:200]}"


def main() -> None:
    name, threads, descriptor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    connection, peer = Connection(descriptor), PEERS[name]
    worker = Worker(peer)
    requests = {
        "load": lambda: peer.load(threads),
        "prepare": worker.prepare,
        "sample": worker.sample,
        "forget": worker.forget,
    }
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:  # the parent is gone or done
            return
        connection.send(_answer(requests[what], arguments))


if __name__ == "__main__":
    main()
