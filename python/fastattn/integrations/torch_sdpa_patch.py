"""fastattn in the place of torch's attention, for code that calls it by torch's name.

One function replaces ``torch.nn.functional.scaled_dot_product_attention``, once and for good, and asks a
`ContextVar` at every call: what a block changes is that variable, so threads and tasks do not disturb each
other, and nothing is left behind by an exception. Unless told otherwise, it calls what stood there before.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

import torch

from fastattn import observers
from fastattn.integrations import torch_observed
from fastattn.integrations.torch_sdpa import scaled_dot_product_attention as _fastattn_sdpa

Function = TypeVar("Function", bound=Callable[..., Any])

_blocks: ContextVar[tuple[patch_sdpa, ...]] = ContextVar("fastattn_patch_sdpa", default=())
_process_wide = False
_installing = threading.Lock()
_installed = False


class patch_sdpa:  # noqa: N801 - a verb, as torch.no_grad is one
    """Send calls of ``torch.nn.functional.scaled_dot_product_attention`` to fastattn.

    ``with patch_sdpa():`` and ``@patch_sdpa()`` hold for the thread or asyncio task that runs the block or
    the function, and for tasks that it starts; other threads do not notice. ``patch_sdpa.enable()`` and
    ``patch_sdpa.disable()`` are the switch for the whole process, which a block overrides. A decorated
    generator is patched while its own code runs, not its caller's between two steps; a block within one
    that spans a ``yield`` holds for the caller too.

    In the block, `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` decline their native
    fast paths, which would compute attention without calling the function.

    Parameters
    ----------
    enabled : bool
        False: torch's own function in the block, whatever surrounds it.

    Notes
    -----
    Reached is whoever looks the name up in ``torch.nn.functional`` at the call, or has looked it up since
    `patch_sdpa` was first used. Not reached: ``from torch.nn.functional import scaled_dot_product_attention``
    that ran before, scripted code, which calls the operator, and code in C++. What compiled code calls is
    decided when it is traced: `torch.compile` in a block, and call for the first time in it.

    See Also
    --------
    scaled_dot_product_attention : what calls are sent to, and which of them it leaves to torch.

    Examples
    --------
    >>> import torch, fastattn as fa
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    >>> with fa.patch_sdpa(), torch.no_grad():
    ...     model(torch.randn(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(
                f"enabled must be a bool, got {type(enabled).__qualname__}; decorate with @patch_sdpa()"
            )
        self.enabled = enabled
        _install()

    @staticmethod
    def enable() -> None:
        """Patch every thread of the process, but for blocks of ``patch_sdpa(False)``."""
        global _process_wide
        _install()
        _process_wide = True

    @staticmethod
    def disable() -> None:
        """Undo `enable`."""
        global _process_wide
        _process_wide = False

    def __enter__(self) -> None:
        _blocks.set((*_blocks.get(), self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # By identity rather than by a token: generators may leave blocks out of order, or in another context.
        blocks = _blocks.get()
        last = max((at for at, block in enumerate(blocks) if block is self), default=len(blocks))
        _blocks.set(blocks[:last] + blocks[last + 1 :])

    def __call__(self, function: Function) -> Function:
        """Decorate a function, a generator, or a coroutine of either kind."""
        if not callable(function) or inspect.isclass(function):
            raise TypeError(
                f"patch_sdpa() decorates functions, got {function!r}: decorate methods one by one"
            )
        wrapper: Callable[..., Any]
        if inspect.isgeneratorfunction(function):
            wrapper = _stepwise(self, function)
        elif inspect.isasyncgenfunction(function):
            wrapper = _stepwise_async(self, function)
        elif inspect.iscoroutinefunction(function):

            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)
        else:

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        decorated: Any = functools.wraps(function)(wrapper)
        patched: Function = decorated
        return patched


def _stepwise(block: patch_sdpa, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
    """Run each step of a generator in `block`, and its caller, between two steps, out of it."""

    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        generator = function(*args, **kwargs)
        step: Callable[[Any], Any] = generator.send
        passed: Any = None
        try:
            while True:
                with block:
                    try:
                        item = step(passed)
                    except StopIteration as end:
                        return end.value
                try:
                    passed = yield item
                    step = generator.send
                except Exception as error:
                    step, passed = generator.throw, error
        finally:
            with block:
                generator.close()

    return wrapper


def _stepwise_async(
    block: patch_sdpa, function: Callable[..., AsyncGenerator[Any, Any]]
) -> Callable[..., Any]:
    """Do the same for an asynchronous generator."""

    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        generator = function(*args, **kwargs)
        step: Callable[[Any], Any] = generator.asend
        passed: Any = None
        try:
            while True:
                with block:
                    try:
                        item = await step(passed)
                    except StopAsyncIteration:
                        return
                try:
                    passed = yield item
                    step = generator.asend
                except Exception as error:
                    step, passed = generator.athrow, error
        finally:
            with block:
                await generator.aclose()

    return wrapper


@contextmanager
def observed(observer: observers.Observer) -> Iterator[None]:
    """Tell `observer` of the attention of the block, torch's as well as fastattn's.

    torch's native fast paths are declined, as in a block of `patch_sdpa`; nothing else computes otherwise.
    """
    _install()
    with torch_observed.multihead(), observers.observe(observer):
        yield


def _is_patched() -> bool:
    blocks = _blocks.get()
    return blocks[-1].enabled if blocks else _process_wide


# What is in force when a compiler of torch comes by holds for what it compiles.
_is_patched._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _install() -> None:
    """Put both functions in their places, the first time."""
    global _installed
    with _installing:
        if not _installed:
            torch.nn.functional.scaled_dot_product_attention = _trampoline(
                torch.nn.functional.scaled_dot_product_attention
            )
            torch.backends.mha.get_fastpath_enabled = _fastpath(torch.backends.mha.get_fastpath_enabled)
            _installed = True


def _trampoline(previous: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(previous)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        function = _fastattn_sdpa if _is_patched() else previous
        if not torch.compiler.is_compiling() and observers.watching():
            return torch_observed.attend(function, *args, **kwargs)
        return function(*args, **kwargs)

    # Pickled by the name under which it is found, in a process where nothing is patched as well.
    scaled_dot_product_attention.__module__ = "torch.nn.functional"
    scaled_dot_product_attention.__qualname__ = "scaled_dot_product_attention"
    # torch.jit.script finds operators by the identity of the function.
    torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")
    return scaled_dot_product_attention


def _fastpath(previous: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(previous)
    def get_fastpath_enabled() -> bool:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            # A compiler knows torch's function by its name, and now meets this one.
            if torch.compiler.is_compiling():
                return torch.backends.mha._is_fastpath_enabled and not _is_patched()
            return previous() and not (_is_patched() or observers.watching())
        return True

    return get_fastpath_enabled
