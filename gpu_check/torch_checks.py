"""What torch asks of an operator on a device: graphs, streams, compilers, autocast. Each is one check."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpu_check import reference
from gpu_check.checks import LIMITS, WrongError, compare
from gpu_check.inputs import poison
from gpu_check.routes import SkippedError

Action = Callable[[str], None]
SHAPE = 2, 8, 333, 64
LIMIT = LIMITS["bfloat16"]


@dataclass(frozen=True)
class TorchCheck:
    """A function that raises where something is wrong."""

    action: Action

    @property
    def label(self) -> str:
        return self.action.__name__.replace("_", " ")

    def run(self, device: str, seed: int, backend: str | None) -> dict[str, float]:
        torch.manual_seed(seed)
        self.action(device)
        return {}


def tensors(device: str, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> list[Tensor]:
    """Query, key and value of two query heads to a key head."""
    batch, heads, rows, dim = SHAPE
    shapes = (SHAPE, (batch, heads // 2, rows, dim), (batch, heads // 2, rows, dim))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for shape in shapes]


def hold(found: Tensor, inputs: list[Tensor], limit: float = LIMIT, **options: Any) -> None:
    """Compare with float64."""
    compare("out", found.detach(), reference.attend(*inputs, **options).out.detach(), limit)


def need_device(device: str) -> None:
    if device == "cpu":
        raise SkippedError("needs a device")


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of one call, and what it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def graph_replays_on_new_inputs(device: str) -> None:
    import fastattn as fa

    need_device(device)
    inputs = tensors(device)
    lengths = torch.tensor([333, 100], device=device)
    graph, out = capture(lambda: fa.attention(*inputs, causal=True, kv_lengths=lengths))
    for second in (77, 0):
        lengths[1] = second
        for old, new in zip(inputs, tensors(device), strict=True):
            old.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        hold(out, inputs, causal=True, kv_lengths=lengths)


def graph_replays_a_decode(device: str) -> None:
    import fastattn as fa

    need_device(device)
    query = torch.randn(4, 16, 1, 128, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, 4, 2, 5000, 128, device=device, dtype=torch.bfloat16).unbind(0)
    lengths = torch.tensor([5000, 4097, 3, 0], device=device)
    graph, out = capture(lambda: fa.attention(query, key, value, kv_lengths=lengths))
    for shift in range(3):
        lengths.copy_(torch.tensor([5000, 4097, 3, 0], device=device).roll(shift))
        query.normal_()
        out.fill_(float("nan"))
        graph.replay()
        hold(out, [query, key, value], kv_lengths=lengths)


def graph_replays_a_training_step(device: str) -> None:
    import fastattn as fa

    need_device(device)
    inputs = tensors(device, grad=True)
    incoming = torch.randn(SHAPE, device=device, dtype=torch.bfloat16)

    def step() -> Any:
        return torch.autograd.grad(fa.attention(*inputs, causal=True), inputs, incoming)

    graph, found = capture(step)
    with torch.no_grad():
        incoming.normal_()
    graph.replay()
    captured = [x.clone() for x in found]
    for one, other in zip(captured, step(), strict=True):
        if not torch.equal(one, other):
            raise WrongError("the gradients of a replay are not those of a call")


def works_on_another_stream(device: str) -> None:
    import fastattn as fa

    need_device(device)
    inputs, fresh = tensors(device), tensors(device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read what is there before
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        out = fa.attention(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    hold(out, inputs)


def never_waits_for_the_device(device: str) -> None:
    import fastattn as fa

    need_device(device)
    inputs = tensors(device, grad=True)
    arguments = {
        "causal": True,
        "kv_lengths": torch.tensor([333, 100], device=device),
        "query_offset": torch.tensor([0, 5], device=device),
        "alibi_slopes": torch.rand(8, device=device, requires_grad=True),
        "sinks": torch.randn(8, device=device, requires_grad=True),
        "mask": torch.rand(2, 1, 333, 333, device=device) < 0.9,
    }
    fa.attention(*inputs, **arguments).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fa.attention(*inputs, **arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiles_as_one_graph(device: str) -> None:
    import fastattn as fa

    inputs = tensors(device, grad=True)
    incoming = torch.randn(SHAPE, device=device).to(torch.bfloat16)

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * fa.attention(query * 0.5, key, value, causal=True)

    compiled = torch.compile(model, fullgraph=True)
    found = compiled(*inputs)
    hold(found / 2, [inputs[0].detach() * 0.5, *inputs[1:]], causal=True)
    gradients = torch.autograd.grad(found, inputs, incoming)
    for one, other in zip(gradients, torch.autograd.grad(model(*inputs), inputs, incoming), strict=True):
        compare("a gradient of compiled code", one, other, LIMIT)


def autocast_casts(device: str) -> None:
    import fastattn as fa

    inputs = tensors(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = fa.attention(*inputs)
    if out.dtype != torch.bfloat16:
        raise WrongError(f"under autocast out is {out.dtype}")
    hold(out, [x.to(torch.bfloat16) for x in inputs])


def patch_takes_the_place_of_sdpa(device: str) -> None:
    import fastattn as fa

    query, key, value = tensors(device)
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    with fa.patch_sdpa():
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    hold(out, [query, key, value], causal=True)
    if not torch.equal(out, fa.attention(query, key, value, causal="top_left")):
        raise WrongError("the patched function is not fastattn's")


def strides_beyond_31_bits(device: str) -> None:
    import fastattn as fa

    need_device(device)
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        raise SkippedError("needs 16 GiB of free memory")
    far = (1 << 31) + 64
    storage = torch.empty(far + 200 * 64, device=device, dtype=torch.bfloat16)
    key = storage.as_strided((1, 2, 200, 64), (0, far, 64, 1)).normal_()
    query = torch.randn(1, 4, 130, 64, device=device, dtype=torch.bfloat16)
    out = fa.attention(query, key, key)
    small = key.clone()
    del storage, key
    hold(out, [query, small, small])


def dropout_draws_from_torch(device: str) -> None:
    import fastattn as fa

    inputs, found = tensors(device), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        poison(device)
        found.append(fa.attention(*inputs, dropout_p=0.3))
    if not torch.equal(found[0], found[1]) or torch.equal(found[0], found[2]):
        raise WrongError("dropout does not follow torch.manual_seed")


def lengths_are_clamped(device: str) -> None:
    import fastattn as fa

    need_device(device)
    inputs = tensors(device)
    out = fa.attention(*inputs, kv_lengths=torch.tensor([10**12, -5], device=device))
    torch.cuda.synchronize()
    hold(out, inputs, kv_lengths=torch.tensor([333, 0], device=device))


_DEBUG = """
import torch, fastattn as fa
x = torch.randn(2, 4, 65, 64, device="cuda", dtype=torch.float16)
fa.attention(x, x, x, kv_lengths=torch.tensor([65, 0], device="cuda"))
try:
    fa.attention(x, x, x, kv_lengths=torch.tensor([66, 0], device="cuda"))
except ValueError as error:
    assert "kv_lengths" in str(error), error
else:
    raise SystemExit("FASTATTN_DEBUG=1 let a length beyond the keys pass")
"""


def debug_checks_lengths(device: str) -> None:
    need_device(device)
    environment = os.environ | {"FASTATTN_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _DEBUG], env=environment, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise WrongError(done.stderr.strip()[-500:])


def explain_names_the_kernels(device: str) -> None:
    import fastattn as fa

    need_device(device)
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for dim in (64, 128):
        query = torch.randn(2, 8, 500, dim, device=device, dtype=torch.bfloat16)
        found = fa.explain(query, query, query, causal=True)
        expected = "hopper" if on_hopper else "portable"
        kernels = [found.details.get(way, "").split(":")[0] for way in ("kernel", "backward")]
        if kernels != [expected, expected]:
            raise WrongError(f"expected {expected}, got: " + "; ".join(str(found).splitlines()))


CHECKS = [
    TorchCheck(action)
    for action in (
        graph_replays_on_new_inputs,
        graph_replays_a_decode,
        never_waits_for_the_device,
        works_on_another_stream,
        compiles_as_one_graph,
        autocast_casts,
        patch_takes_the_place_of_sdpa,
        graph_replays_a_training_step,
        dropout_draws_from_torch,
        lengths_are_clamped,
        debug_checks_lengths,
        explain_names_the_kernels,
        strides_beyond_31_bits,
    )
]
