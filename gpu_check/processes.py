"""Lists worked through by processes that may hang or crash: that costs the item they were at, no other."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gpu_check import ROOT
from gpu_check.worker import DEVICE_LOST, MARK

LAST_WORDS = 30.0  # seconds that a process has to end in when its work is done
LAST_LINES = 60  # of what a process prints besides, kept for a crash
ENDING = 1 << 30  # the index of what became of a process after its last item


@dataclass
class Outcome:
    """What became of one item."""

    label: str
    status: str  # right, wrong, failed, hung, crashed, skipped, left out
    seconds: float = 0.0
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    log: str = ""


@dataclass
class Task:
    """Some items of a list, for one process at a time."""

    list: str
    items: dict[int, str]  # labels by index
    patience: float = 60.0  # seconds without news after which a process counts as hung
    under: tuple[str, ...] = ()  # a checker's command, before that of the process
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment
    arguments: tuple[str, ...] = ()  # more of the worker's
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.under[0].rpartition("/")[2] if self.under else self.list

    def remaining(self) -> list[int]:
        return [index for index in self.items if index not in self.outcomes]


@dataclass(frozen=True)
class Runner:
    """How processes are started."""

    environment: Mapping[str, str]
    device: str
    seed: int
    backend: str | None = None
    python: str = sys.executable

    def run(
        self,
        tasks: list[Task],
        at_once: int,
        deadline: float,
        report: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Work through all tasks until `deadline` (of time.monotonic); what is left then is said to be."""
        with ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(self.work_through, task, deadline, report) for task in tasks]:
                done.result()

    def work_through(self, task: Task, deadline: float, report: Callable[[Outcome], None]) -> None:
        """Start processes until every item has an outcome."""
        while (remaining := task.remaining()) and time.monotonic() < deadline:
            process = self._start(task, remaining)
            lines = _lines(process)
            try:
                _listen(task, process, lines, deadline, report)
            finally:
                _end(process)
        for index in task.remaining():
            task.outcomes[index] = Outcome(task.items[index], "left out", why="no time was left")

    def _start(self, task: Task, items: list[int]) -> subprocess.Popen[str]:
        command = [*task.under, self.python, "-m", "gpu_check.worker", task.list, *task.arguments]
        command += ["--items", ",".join(map(str, items)), "--device", self.device, "--seed", str(self.seed)]
        command += ["--backend", self.backend] if self.backend else []
        return subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **task.variables}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """What it prints as it comes; None at the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _listen(
    task: Task,
    process: subprocess.Popen[str],
    lines: queue.Queue[str | None],
    deadline: float,
    report: Callable[[Outcome], None],
) -> None:
    """Take in what a process says until it ends, is silent for too long, or time is up."""
    at = last = task.remaining()[0]
    ended = False
    since, log = time.monotonic(), deque[str](maxlen=LAST_LINES)

    def settle(index: int, status: str, why: str = "", **found: Any) -> None:
        kept = "" if status in ("right", "skipped", "wrong") else "\n".join(log)
        label = task.items.get(index, f"end of the process behind {task.items[at]}")
        outcome = Outcome(label, status, time.monotonic() - since, why, found, kept)
        task.outcomes[index] = outcome
        report(outcome)

    for line in _until(lines, task.patience, deadline):
        if line is None:
            if time.monotonic() < deadline:
                settle(at, "hung", f"no news for {task.patience:.0f} s")
            return
        if not line.startswith(MARK):
            log.append(line)
            continue
        message = json.loads(line[len(MARK) :])
        if "end" in message:  # not the end of its output, which a compiler that it started may hold open
            ended, since = True, time.monotonic()
            break
        if "start" in message:
            at, since = message["start"], time.monotonic()
            log.clear()
        else:
            last = message.pop("done")
            settle(last, **message)
    status, remaining = _exit_code(process), task.remaining()
    if status and not (status == DEVICE_LOST and last in task.outcomes):
        log.extend(_last_words(lines))
        settle(ENDING if ended else at, "crashed", f"the process ended with {status}")
    elif remaining and last not in task.outcomes:
        settle(remaining[0], "crashed", "the process ended without a word")


def _until(lines: queue.Queue[str | None], patience: float, deadline: float) -> Iterator[str | None]:
    """Yield lines to the end of output, and None once where there is no news for too long."""
    while True:
        wait = min(patience, deadline - time.monotonic())
        try:
            line = lines.get(timeout=max(wait, 0.0))
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield line


def _last_words(lines: queue.Queue[str | None]) -> Iterator[str]:
    """Yield what a process that is no more has printed and nobody has read."""
    with suppress(queue.Empty):
        while (line := lines.get(timeout=1.0)) is not None:
            yield line


def _exit_code(process: subprocess.Popen[str]) -> int | str:
    try:
        return process.wait(LAST_WORDS)
    except subprocess.TimeoutExpired:
        return "no exit"


def _end(process: subprocess.Popen[str]) -> None:
    """End it with all that it started, compilers among them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
