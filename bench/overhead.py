"""Where the microseconds of a call on one token go: ``python -m bench.overhead``.

One query, one key, one head of 64 columns in float32 on one thread, so that next to nothing is computed. Rows
take turns, and each shows its quickest round: what something else on the machine costs is no part of a call.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastattn as fa
import fastattn.torch
from fastattn import _core
from fastattn.backends import plain
from fastattn.torch_ops import graph
from fastattn.torch_ops.arguments import Operands, Rules

CALLS = 200  # in a round: some milliseconds, less than a time slice

Action = Callable[[], Any]


class _Empty(torch.autograd.Function):
    """A node that keeps what attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, out: Any, lse: Any) -> Any:
        ctx.save_for_backward(query, key, value, out, lse)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        assert ctx.saved_tensors
        return grad, grad, grad, None, None


def actions() -> dict[str, Action]:
    """What is timed, by what it is called."""
    query, key, value, grad = torch.randn(4, 1, 1, 1, 64).unbind(0)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    torchs, empty = torch.nn.functional.scaled_dot_product_attention, _Empty.apply
    out, lse = fa.attention(query, key, value, return_lse=True)
    call = plain.PlainCall(False, None, False, False)
    kept, wanted = (query, key, value, out, lse), (True, True, True)
    rules = Rules("", None, None, None, 0.0, None, 0.0, None, 0, "bhsd", None, None, None)
    operands = (*[None] * len(Operands._fields), *rules, False)
    mask = torch.ones(1, 1, dtype=torch.bool)
    new, caches = (key, value), torch.zeros(2, 1, 4, 1, 64).unbind(0)
    appended = {"new_key": key, "new_value": value, "cache_seqlens": 0}

    def there_and_back(function: Callable[..., Any]) -> Action:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    def accumulated() -> None:
        fa.attention(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return {
        "torch: a product of three tensors, there and back": there_and_back(lambda q, k, v: q * k * v),
        "torch: an empty autograd.Function, there and back": there_and_back(lambda *x: empty(*x, out, lse)),
        "torch: its attention, no gradients": lambda: torchs(query, key, value),
        "torch: its attention, there and back": there_and_back(torchs),
        "attention(), no gradients": lambda: fa.attention(query, key, value),
        "  of which: read tensors, allocate, compute, in C++": lambda: _core.attention_plain_torch(
            query, key, value, None, False, None, False, False, 1
        ),
        "attention(mask=...), no gradients": lambda: fa.attention(query, key, value, mask=mask),
        "attention_with_kvcache()": lambda: fa.attention_with_kvcache(query, *new),
        "attention_with_kvcache(), a token appended": lambda: fa.attention_with_kvcache(
            query, *caches, **appended
        ),
        "torch.ops.fastattn.forward": lambda: torch.ops.fastattn.forward(query, key, value, *operands),
        "attention(), gradients recorded": lambda: fa.attention(*leaves),
        "  of which: read, allocate, compute, log-sum-exp": lambda: _core.attention_plain_torch(
            query, key, value, None, False, None, False, True, 1
        ),
        "  of which: the node": lambda: graph.record(*leaves, (out.detach(), lse), call),
        "attention(), there and back": there_and_back(fa.attention),
        "  of which: read, allocate, compute back": lambda: plain.backward(grad, None, kept, wanted, call),
        "attention(), there and .backward(g)": accumulated,
        "attention(mask=...), there and back": there_and_back(lambda *x: fa.attention(*x, mask=mask)),
    }


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """The quickest round and the median one of each, in microseconds a call."""
    timed = actions()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, action in timed.items():
            times[name].append(timeit.timeit(action, number=CALLS) / CALLS * 1e6)
    return {name: (min(seen), sorted(seen)[len(seen) // 2]) for name, seen in times.items()}


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table("a call on one token", title=f"{_core.cpu_name()}, torch {torch.__version__}")
    table.add_column("best, us", justify="right")
    table.add_column("median, us", justify="right")
    for name, (best, median) in measure(options.rounds).items():
        table.add_row(name, f"{best:.1f}", f"{median:.1f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
