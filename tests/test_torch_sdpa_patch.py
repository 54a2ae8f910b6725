"""fastattn in the place of torch's function: who is reached, who is not, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.integrations import torch_flash, torch_sdpa_patch

functional = torch.nn.functional
X = torch.linspace(-1, 1, 2 * 3 * 4 * 8).reshape(2, 3, 4, 8)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """One entry a call that came to fastattn: the thread that made it."""
    calls: list[threading.Thread] = []

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(threading.current_thread())
        return fastattn.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch_sdpa_patch, "_fastattn_sdpa", count)
    return calls


@pytest.fixture
def reached(served: list[Any]) -> Iterator[Callable[[], bool]]:
    """Ask whether a call gets to fastattn now, and see that none does after the test."""

    def ask() -> bool:
        before = len(served)
        functional.scaled_dot_product_attention(X, X, X)
        return len(served) > before

    yield ask
    assert not ask() and torch.backends.mha.get_fastpath_enabled()


def test_a_block_and_what_is_around_it(reached: Callable[[], bool]) -> None:
    assert not reached()
    with fastattn.patch_sdpa():
        assert reached()
        with fastattn.patch_sdpa(False):
            assert not reached()
            with fastattn.patch_sdpa():
                assert reached()
            assert not reached()
        assert reached()
    assert not reached()


def test_one_object_may_be_entered_twice(reached: Callable[[], bool]) -> None:
    block = fastattn.patch_sdpa()
    with block:
        with block:
            assert reached()
        assert reached()


def test_an_exception_restores(reached: Callable[[], bool]) -> None:
    with pytest.raises(KeyboardInterrupt), fastattn.patch_sdpa():
        raise KeyboardInterrupt


def test_the_switch_of_the_process(reached: Callable[[], bool]) -> None:
    results: list[bool] = []
    fastattn.patch_sdpa.enable()
    try:
        assert reached()
        thread = threading.Thread(target=lambda: results.append(reached()))
        thread.start()
        thread.join()
        with fastattn.patch_sdpa(False):
            assert not reached()
    finally:
        fastattn.patch_sdpa.disable()
    assert results == [True]


def test_threads_do_not_notice(served: list[threading.Thread], reached: Callable[[], bool]) -> None:
    """Eight threads in and out of blocks, each seeing its own alone."""
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(patched: bool) -> None:
        me = threading.current_thread()
        start.wait()
        for _ in range(50):
            with fastattn.patch_sdpa(patched):
                functional.scaled_dot_product_attention(X, X, X)
                if torch.backends.mha.get_fastpath_enabled() == patched:
                    wrong.append("fast path")
        if served.count(me) != (50 if patched else 0):
            wrong.append("calls")

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(served) == 4 * 50


def test_tasks_do_not_disturb_each_other(reached: Callable[[], bool]) -> None:
    @fastattn.patch_sdpa()
    async def patched() -> list[bool]:
        answers = [reached()]
        await asyncio.sleep(0)
        return [*answers, reached()]

    async def plain() -> list[bool]:
        answers = [reached()]
        await asyncio.sleep(0)
        return [*answers, reached()]

    async def both() -> list[list[bool]]:
        return await asyncio.gather(patched(), plain(), patched())

    assert asyncio.run(both()) == [[True, True], [False, False], [True, True]]


def test_a_decorated_function_is_still_itself(reached: Callable[[], bool]) -> None:
    assert decorated(reached) and decorated.__name__ == "decorated" and decorated.__doc__ == "Ask."
    assert pickle.loads(pickle.dumps(decorated)) is decorated and copy.deepcopy(decorated) is decorated
    assert Holder().method(reached)
    block = fastattn.patch_sdpa(False)
    assert pickle.loads(pickle.dumps(block)).enabled is copy.deepcopy(block).enabled is False


@fastattn.patch_sdpa()
def decorated(ask: Callable[[], bool]) -> bool:
    """Ask."""
    return ask()


class Holder:
    @fastattn.patch_sdpa()
    def method(self, ask: Callable[[], bool]) -> bool:
        return ask()


def test_a_decorated_generator_is_patched_between_its_own_lines_alone(reached: Callable[[], bool]) -> None:
    closed: list[bool] = []

    @fastattn.patch_sdpa()
    def generate() -> Iterator[Any]:
        try:
            sent = yield reached()
            assert sent == "sent"
            try:
                yield reached()
            except ZeroDivisionError:
                yield "caught", reached()
            yield
        finally:
            closed.append(reached())
        return "returned"

    steps = generate()
    assert next(steps) is True and not reached()
    assert steps.send("sent") is True and not reached()
    assert steps.throw(ZeroDivisionError()) == ("caught", True) and not reached()
    steps.close()
    assert closed == [True] and not reached()
    steps = generate()
    assert next(steps) and steps.send("sent") and next(steps) is None
    with pytest.raises(StopIteration, match="returned"):
        next(steps)
    with pytest.raises(KeyboardInterrupt):
        generate().throw(KeyboardInterrupt())


def test_a_decorated_asynchronous_generator(reached: Callable[[], bool]) -> None:
    closed: list[bool] = []

    @fastattn.patch_sdpa()
    async def generate() -> AsyncIterator[Any]:
        try:
            for _ in range(2):
                try:
                    yield reached()
                except ZeroDivisionError:
                    yield "caught", reached()
        finally:
            closed.append(reached())

    async def consume() -> None:
        async for answer in generate():
            assert answer is True and not reached()
        steps = generate()
        assert await anext(steps) is True
        assert await steps.athrow(ZeroDivisionError()) == ("caught", True) and not reached()
        await steps.aclose()

    asyncio.run(consume())
    assert closed == [True, True]


def test_blocks_may_be_left_out_of_order_and_elsewhere(reached: Callable[[], bool]) -> None:
    def suspended() -> Iterator[None]:
        with fastattn.patch_sdpa():
            yield

    first, second = suspended(), suspended()
    next(first), next(second)
    first.close()
    assert reached()
    second.close()
    assert not reached()
    third = suspended()
    contextvars.copy_context().run(next, third)
    third.close()


@pytest.mark.parametrize("wrong", [lambda: 0, None, 1])
def test_what_is_no_bool_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"enabled must be a bool, got \w+; decorate with @patch_sdpa\(\)"):
        fastattn.patch_sdpa(wrong)


@pytest.mark.parametrize("wrong", [Holder, 1])
def test_what_is_no_function_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"patch_sdpa\(\) decorates functions, got"):
        fastattn.patch_sdpa()(wrong)


@pytest.mark.parametrize("layer", ["attention", "layer", "encoder"])
def test_native_fast_paths_are_declined(layer: str, served: list[Any], reached: Callable[[], bool]) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    module = {
        "attention": nn.MultiheadAttention(16, 2, batch_first=True),
        "layer": encoder,
        "encoder": nn.TransformerEncoder(encoder, 2),
    }[layer].eval()
    x = torch.randn(2, 5, 16)
    arguments = (x, x, x, None, False) if layer == "attention" else (x,)
    with torch.inference_mode():
        expected = module(*arguments)
        assert not served
        with fastattn.patch_sdpa():
            got = module(*arguments)
    assert len(served) == (2 if layer == "encoder" else 1)
    torch.testing.assert_close(got, expected)


def test_training_through_a_block(served: list[Any]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    with fastattn.patch_sdpa():
        loss = layer(x).square().sum()
    loss.backward()
    assert served
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5)


def attend(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_the_rest_of_torch_sees_its_own_function(served: list[Any]) -> None:
    fastattn.patch_sdpa()
    function = functional.scaled_dot_product_attention
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__doc__ == torch._C._nn.scaled_dot_product_attention.__doc__
    node = list(torch.fx.symbolic_trace(attend).graph.nodes)[1]
    assert node.target is torch._C._nn.scaled_dot_product_attention
    assert not served


def operators(function: Callable[..., Any], x: torch.Tensor) -> list[str]:
    """What a graph calls that is compiled now."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[str] = []

    def compiler(module: torch.fx.GraphModule, example: Any) -> Any:
        found.extend(str(node.target) for node in module.graph.nodes if "att" in str(node.target))
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    return found


@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
def test_compiled_code_calls_what_is_in_force_when_it_is_traced(layer: bool) -> None:
    function = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval() if layer else attend
    x = X[0] if layer else X
    assert "fastattn.forward.default" not in operators(function, x)
    with fastattn.patch_sdpa():
        assert operators(function, x) == ["fastattn.forward.default"]
    assert "fastattn.forward.default" not in operators(function, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripts_are_compiled_as_before() -> None:
    fastattn.patch_sdpa()
    assert "aten::scaled_dot_product_attention" in str(torch.jit.script(attend).graph)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = X[0]
    torch.testing.assert_close(torch.jit.script(module)(x, x, x)[0], module(x, x, x)[0])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """fastattn active in torch's registry; counts the calls that it computes."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fastattn.attention(*args, **kwargs)

    monkeypatch.setattr(torch_flash, "attention", count)
    torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    yield calls
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    calls.clear()
    torch._C._nn.scaled_dot_product_attention(X, X, X)
    assert not calls


MASK = torch.ones(4, 4).tril().flip(0).log()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"attn_mask": MASK},
    {"scale": 0.3},
    {"attn_mask": MASK > -1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "bias", "scale", "mask"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_in_torchs_registry(options: dict[str, Any], by_rows: bool, registered: list[int]) -> None:
    x = X.transpose(1, 2).contiguous().transpose(1, 2) if by_rows else X
    if "attn_mask" in options:  # and a row that sees nothing
        options = {"attn_mask": options["attn_mask"].clone()}
        options["attn_mask"][0] = False if options["attn_mask"].dtype == torch.bool else -torch.inf
    query, key, value = (factor * x for factor in (1, 2, -1))
    expected = fastattn.scaled_dot_product_attention(query, key, value, **options)
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (query, key, value)]
    out = torch._C._nn.scaled_dot_product_attention(*leaves, **options)
    assert registered and out.stride() == query.stride()
    torch.testing.assert_close(out.detach(), expected)
    theirs = torch.autograd.grad(out, leaves, x)
    mine = torch.autograd.grad(fastattn.scaled_dot_product_attention(*leaves, **options), leaves, x)
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_registry_reaches_compiled_code(registered: list[int]) -> None:
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(X)
    assert registered
    torch.testing.assert_close(compiled, fastattn.attention(X, X, X))


def test_what_has_no_kernel_is_torchs_in_the_registry_too(registered: list[int]) -> None:
    wide = X.repeat(1, 1, 1, 80)
    expected = fastattn.attention(wide, wide, wide, backend="math")
    torch.testing.assert_close(torch._C._nn.scaled_dot_product_attention(wide, wide, wide), expected)


def test_a_torch_without_the_registry_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"has no torch.nn.attention.register_flash_attention_impl: use"):
        torch_flash.register()
