"""Who is told of the attention that is computed, besides the caller: `fastattn.viz.record`, in its block.

Observers belong to a thread or an asyncio task, so others compute undisturbed and nothing is left behind.
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
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("fastattn_observers", default=())


def watching() -> bool:
    """Whether anybody wants to know of this thread's or task's calls."""
    return blocks > 0 and bool(_observers.get())


def tell(problem: AttentionProblem) -> None:
    """Show a call to everybody who wants to know; what they compute themselves is shown to nobody."""
    observers = _observers.get()
    with silence():
        for observer in observers:
            observer(problem)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every call in the block."""
    global blocks
    with _counting:
        blocks += 1
    _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        # By identity rather than by a token: a generator may leave its block in another context.
        _observers.set(tuple(other for other in _observers.get() if other is not observer))
        with _counting:
            blocks -= 1


@contextmanager
def silence() -> Iterator[None]:
    """Tell nobody of the calls in the block: they are part of one that is told of."""
    observers = _observers.get()
    _observers.set(())
    try:
        yield
    finally:
        _observers.set(observers)
