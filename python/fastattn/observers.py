"""Who is told of the attention that is computed, besides the caller: `fastattn.viz.record`, in its block.

Observers belong to a thread or an asyncio task, so others compute undisturbed. A block that has ended has
ended for the tasks that it started, too, whose context is a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from fastattn.problem import AttentionProblem

Observer: TypeAlias = Callable[[AttentionProblem], None]

blocks = 0  # of all threads; what a call on few tokens asks, since a number is read in no time
_counting = threading.Lock()


class _Block:
    """An observer, until its block ends."""

    def __init__(self, observer: Observer) -> None:
        self.observer, self.open = observer, True


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("fastattn_observers", default=())


def watching() -> bool:
    """Whether anybody wants to know of this thread's or task's calls."""
    return blocks > 0 and any(block.open for block in _blocks.get())


def tell(problem: AttentionProblem) -> None:
    """Show a call to everybody who wants to know; what they compute themselves is shown to nobody."""
    told = _blocks.get()
    with silence():
        for block in told:
            if block.open:
                block.observer(problem)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every call in the block."""
    global blocks
    with _counting:
        blocks += 1
    block = _Block(observer)
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    finally:
        block.open = False
        # By identity rather than by a token: a generator may leave its block in another context.
        _blocks.set(tuple(other for other in _blocks.get() if other is not block))
        with _counting:
            blocks -= 1


@contextmanager
def silence() -> Iterator[None]:
    """Tell nobody of the calls in the block: they are part of one that is told of."""
    told = _blocks.get()
    _blocks.set(())
    try:
        yield
    finally:
        _blocks.set(told)
