"""Times: contestants in turn, with the machine's own limit read between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.accuracy import Answers, Truth, gradients, truth
from bench.ceilings import Ceilings, Limit, limit_of
from bench.results import BASE, Row
from bench.samples import Contestant, Sample, keep
from bench.suites import Job
from bench.workers import PeerError, Worker, Workers
from tests.shapes import Case

ROUNDS, FEWEST_ROUNDS = 9, 5
# A row that loses samples to a busy machine gets more turns, up to this many times as many.
_PATIENCE = 2


@dataclass
class Entry:
    """A contestant, and where its call is prepared."""

    name: str
    worker: Worker
    number: int  # of the call, in the worker
    contestant: Contestant


def measure(
    job: Job,
    peers: Sequence[str],
    *,
    workers: Workers,
    ceilings: Ceilings,
    seconds: float,
    threads: int,
    tick: Callable[[str], None] = lambda _: None,
) -> Row:
    """Check every contestant, then time those that are right, `seconds` each; `tick` hears what goes on."""
    limit = limit_of(job.dtype, job.reads, job.threads or threads, job.isa)
    row = Row.of(job, limit, quotes_ceiling=job.unit != "ktoken/s")
    tick(f"{job}: oracle")
    try:
        expected = {id(job): _truth(job)}
    except ModuleNotFoundError as error:  # of a model
        row.contestants["fastattn"] = Contestant("absent", f"{error}; `make demo` does so, too")
        return row
    contests = [(peer, job) for peer in peers]
    if job.base is not None:
        same = (job.base.case, job.base.dtype, job.base.mode) == (job.case, job.dtype, job.mode)
        expected[id(job.base)] = expected[id(job)] if same else _truth(job.base)
        contests += [(peer, job.base) for peer in peers if peer in ("fastattn", "torch")]
    entries = []
    for number, (peer, contest) in enumerate(contests):
        name = peer if contest is job else peer + BASE
        tick(f"{job}: {name}")
        entry = _enter(name, number, contest, expected[id(contest)], workers, threads)
        if isinstance(entry, Contestant):
            row.contestants[name] = entry
            continue
        row.contestants[name] = entry.contestant
        if entry.contestant.status == "right":
            entries.append(entry)
    tick(str(job))
    _take_turns(entries, limit, ceilings, seconds)
    workers.forget()
    return row


def _truth(job: Job) -> Truth | Answers:
    case, dtype, mode = job.case, job.dtype, job.mode
    if not isinstance(case, Case):
        return Answers(case.truth(dtype, mode), dtype, case.tolerance(dtype))
    return truth(case, dtype) if mode == "forward" else gradients(case, dtype, mode)


def _enter(
    name: str, number: int, job: Job, expected: Truth | Answers, workers: Workers, threads: int
) -> Entry | Contestant:
    """Prepare a call and judge its output; a Contestant alone where there is nothing to time."""
    peer = name.removesuffix(BASE)
    try:
        worker = workers.get(peer, job.threads or threads, job.isa)
    except PeerError as error:
        return Contestant("absent", str(error))
    try:
        status, answer = worker.ask("prepare", number, job.case, job.dtype, job.mode, job.library, job.cold)
    except PeerError as error:
        if worker.ended:
            workers.discard(worker)
        return Contestant("failed", str(error))
    if status == "refused":
        return Contestant("refused", answer)
    verdict = expected.judge(answer, peer)
    return Entry(
        name,
        worker,
        number,
        Contestant(verdict.status, verdict.why, *map(_finite, (verdict.error, verdict.relative))),
    )


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _take_turns(entries: list[Entry], limit: Limit, ceilings: Ceilings, seconds: float) -> None:
    """Rounds in which each contestant is sampled once, in an order that turns, between two readings."""
    before = ceilings.read(limit)
    rounds, most = ROUNDS, _PATIENCE * ROUNDS
    turn = 0
    while entries and turn < rounds:
        for entry in entries[turn % len(entries) :] + entries[: turn % len(entries)]:
            try:
                elapsed, cores, floor = entry.worker.ask("sample", entry.number, seconds / ROUNDS)
            except PeerError as error:
                entry.contestant.status, entry.contestant.why = "failed", str(error)
                entry.contestant.samples.clear()
                continue
            after = ceilings.read(limit)
            entry.contestant.samples.append(Sample(elapsed, cores, before, after, floor))
            before = after
        entries = [entry for entry in entries if entry.contestant.status == "right"]
        turn += 1
        if turn == 1 and any(
            entry.contestant.samples[0].seconds > seconds / FEWEST_ROUNDS for entry in entries
        ):
            rounds, most = FEWEST_ROUNDS, FEWEST_ROUNDS
        best = ceilings.best[str(limit)]
        fewest = min((len(keep(e.contestant.samples, best, limit.kind)) for e in entries), default=0)
        if turn == rounds and rounds < most and fewest < rounds // 2:
            rounds += 1
