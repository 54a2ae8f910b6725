"""The short way of plain calls: it answers as the long way does, bit for bit, or leaves the call to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastattn.torch  # the short way of tensors is open from then on
from fastattn.backends import plain
from fastattn.dispatch import choose
from fastattn.outputs import prepare_outputs
from fastattn.problem import AttentionProblem
from kernels import assert_same_bits
from processes import output_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def the_long_way(*tensors: Any, bshd: bool = False, **options: Any) -> Any:
    problem = AttentionProblem.from_arguments(*tensors, **options, layout="bshd" if bshd else "bhsd")
    outputs = prepare_outputs(problem, None, False, False)
    choose(problem, ("cpu",)).run(problem, outputs)
    return outputs.returned()


def tensors(*, rows: int = 9, keys: int = 33, value_dim: int = 24, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 6, rows, 24), (2, 3, keys, 24), (2, 3, keys, value_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value_dim", [24, 40])
def test_torch_calls_get_the_bits_of_the_long_way(dtype: Any, causal: bool, value_dim: int) -> None:
    arguments = tensors(value_dim=value_dim, dtype=dtype)
    out = plain.attend(*arguments, causal, 0.3, False)
    assert out is not None and out.dtype is dtype and out.is_contiguous()
    assert_same_bits(out, the_long_way(*arguments, causal=causal, scale=0.3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_numpy_calls_get_the_bits_of_the_long_way(dtype: Any, causal: bool) -> None:
    arguments = [tensor.numpy().astype(dtype) for tensor in tensors()]
    out = plain.attend(*arguments, causal, None, False)
    assert out is not None and out.dtype == dtype
    assert_same_bits(out, the_long_way(*arguments, causal=causal))


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("bshd", [False, True])
def test_views_and_layouts(numpy: bool, bshd: bool) -> None:
    """Transposed, sliced and expanded operands."""
    query, key, value = tensors()
    key, value = key[:, :1].expand(-1, 3, -1, -1), value.transpose(2, 3).contiguous().transpose(2, 3)
    arguments: list[Any] = [query[:, :, 1:8], key, value]
    if bshd:
        arguments = [tensor.transpose(1, 2) for tensor in arguments]
    if numpy:
        arguments = [tensor.numpy() for tensor in arguments]
    out = plain.attend(*arguments, True, None, bshd)
    assert out is not None and out.shape == ((2, 7, 6, 24) if bshd else (2, 6, 7, 24))
    assert_same_bits(out, the_long_way(*arguments, causal=True, bshd=bshd))


LENGTHS = {
    "int64": torch.tensor([33, 0]),
    "int32": torch.tensor([7, 32], dtype=torch.int32),
    "every other": torch.tensor([8, 9, 10])[::2],
    "expanded": torch.tensor([21]).expand(2),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_lengths_of_the_keys(lengths: Any, numpy: bool, causal: bool, rows: int) -> None:
    arguments = [*tensors(rows=rows), lengths]
    if numpy:
        arguments = [tensor.numpy() for tensor in arguments]
    *arrays, lengths = arguments
    out = plain.attend(*arrays, causal, None, False, kv_lengths=lengths)
    assert out is not None
    assert_same_bits(out, the_long_way(*arrays, causal=causal, kv_lengths=lengths))
    assert_same_bits(out, fastattn.attention(*arrays, causal=causal, kv_lengths=lengths))


@pytest.mark.parametrize(
    ("lengths", "what"),
    [
        (torch.tensor([33, 34]), ValueError),
        (torch.tensor([-1, 3]), ValueError),
        (torch.tensor([1, 2, 3]), ValueError),
        (torch.tensor([[1, 2]]), ValueError),
        (torch.tensor([1.0, 2.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (np.array([1, 2]), TypeError),
        ([1, 2], None),
        (torch.tensor([1, 2], dtype=torch.int16), None),
    ],
)
def test_unusual_lengths_take_the_long_way(lengths: Any, what: type[Exception] | None) -> None:
    arguments = tensors()
    assert plain.attend(*arguments, False, None, False, kv_lengths=lengths) is None
    if what is None:
        out = fastattn.attention(*arguments, kv_lengths=lengths)
        assert_same_bits(out, plain.attend(*arguments, False, None, False, kv_lengths=torch.tensor([1, 2])))
    else:
        with pytest.raises(what, match=r"^kv_lengths"):
            fastattn.attention(*arguments, kv_lengths=lengths)


def test_lengths_with_gradients_take_the_long_way() -> None:
    arguments = [tensor.requires_grad_() for tensor in tensors()]
    lengths = torch.tensor([5, 6])
    assert plain.attend(*arguments, False, None, False, kv_lengths=lengths) is None
    out = fastattn.attention(*arguments, kv_lengths=lengths)
    assert out.requires_grad
    with torch.no_grad():
        assert_same_bits(plain.attend(*arguments, False, None, False, kv_lengths=lengths), out.detach())


class Subclass(torch.Tensor):
    pass


def _at(index: int, change: Any) -> Any:
    def changed() -> list[Any]:
        arguments = tensors()
        arguments[index] = change(arguments[index])
        return arguments

    return changed


ODD = {
    "subclass": _at(2, lambda value: value.as_subclass(Subclass)),
    "negated": _at(0, lambda query: torch.complex(query, query).conj().imag),
    "meta": _at(1, lambda key: key.to("meta")),
    "sparse": _at(2, lambda value: value.to_sparse()),
    "another dtype": _at(1, lambda key: key.double()),
    "integers": lambda: [tensor.int() for tensor in tensors()],
    "numpy among torch": _at(1, lambda key: key.numpy()),
    "torch among numpy": lambda: [tensors()[0].numpy(), *tensors()[1:]],
    "three axes": _at(0, lambda query: query[0]),
    "heads that do not divide": _at(0, lambda query: query[:, :5]),
    "another length": _at(2, lambda value: value[:, :, 1:]),
    "no keys": lambda: tensors(keys=0),
    "no rows": lambda: tensors(rows=0),
    "a list": _at(0, lambda query: query.tolist()),
    "a foreign byte order": lambda: [tensor.numpy().astype(">f4") for tensor in tensors()],
    "a masked array": lambda: [np.ma.MaskedArray(tensor.numpy()) for tensor in tensors()],
    "a negative stride": lambda: [tensor.numpy()[:, :, ::-1] for tensor in tensors()],
    "an overflowing result": lambda: [
        tensors()[0][:1, :1, :1, :1].expand(1, 1, 1 << 58, 1),
        *[tensor[:1, :1, :, :1] for tensor in tensors()[1:2]],
        tensors()[2][:1, :1].expand(1, 1, 33, 24),
    ],
}


@pytest.mark.parametrize("arguments", ODD.values(), ids=ODD)
def test_anything_unusual_takes_the_long_way(arguments: Any) -> None:
    assert plain.attend(*arguments(), False, None, False) is None


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1, "1", np.float32(1)])
def test_an_unusual_scale_takes_the_long_way(scale: Any) -> None:
    assert plain.attend(*tensors(), False, scale, False) is None


@pytest.mark.parametrize("layout", [np.array("bhsd"), np.array(["bhsd", "x"]), b"bhsd"], ids=str)
def test_a_layout_of_another_type_is_refused_as_ever(layout: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^layout must be"):
        fastattn.attention(*tensors(), layout=layout)


def test_modes_and_transforms_take_the_long_way() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    class DispatchMode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    def ask() -> Any:
        return plain.attend(*arguments, False, None, False)

    arguments = tensors()
    assert ask() is not None
    for mode in FunctionMode(), DispatchMode(), torch.autocast("cpu"), torch.autograd.forward_ad.dual_level():
        with mode:
            assert ask() is None, mode
    seen: list[Any] = []
    torch.func.vmap(lambda x: seen.append(ask()) or x)(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(ask()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen == [None, None]
    assert ask() is not None


def test_a_named_backend_in_the_environment_is_asked(environment: pytest.MonkeyPatch) -> None:
    arguments = tensors()
    environment.setenv("FASTATTN_BACKEND", "reference")
    expected = fastattn.attention(*arguments, backend="reference")
    assert_same_bits(fastattn.attention(*arguments), expected)


def test_an_exhausted_memory_is_a_memory_error() -> None:
    """The result is allocated by the array's own library, whose error comes through."""
    query = np.broadcast_to(np.float32(1), (1, 1, 1 << 50, 1))
    with pytest.raises(MemoryError):
        plain.attend(query, query[:, :, :1], query[:, :, :1], False, None, False)


@pytest.mark.parametrize("bshd", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_bits_of_the_long_way(dtype: Any, bshd: bool) -> None:
    """Of values and log-sum-exps, for any subset of the tensors, strided ones among them."""
    query, key, value = tensors(value_dim=40, dtype=dtype)
    arguments = [query[:, :, 1:8], key, value.transpose(2, 3).contiguous().transpose(2, 3)]
    if bshd:
        arguments = [tensor.transpose(1, 2) for tensor in arguments]
    options: dict[str, Any] = {"causal": True, "scale": 0.3, "layout": "bshd" if bshd else "bhsd"}
    for wanted in (0, 1, 2), (0,), (1,), (2,):
        leaves = [tensor.detach().requires_grad_(at in wanted) for at, tensor in enumerate(arguments)]
        asked = [leaves[at] for at in wanted]
        for weight in 0, 1:  # of the log-sum-exps in the loss
            out, lse = fastattn.attention(*leaves, return_lse=True, **options)
            by_long, lse_by_long = fastattn.attention(*leaves, return_lse=True, softcap=0, **options)
            assert type(out.grad_fn) is not type(by_long.grad_fn)
            assert_same_bits((out.detach(), lse.detach()), (by_long.detach(), lse_by_long.detach()))
            grads = torch.autograd.grad(out.sum() + weight * lse.sum(), asked)
            assert all(grad.is_contiguous() for grad in grads)
            assert_same_bits(grads, torch.autograd.grad(by_long.sum() + weight * lse_by_long.sum(), asked))


def test_a_gradient_of_the_log_sum_exp_alone() -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    _, lse = fastattn.attention(*leaves, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), leaves)
    _, lse = fastattn.attention(*leaves, return_lse=True, backend="math")
    torch.testing.assert_close(grads, torch.autograd.grad(lse.sum(), leaves, materialize_grads=True))


def test_parameters_are_plain() -> None:
    query, key, value = tensors()
    with torch.no_grad():
        out = plain.attend(torch.nn.Parameter(query), key, value, False, None, False)
    assert type(out) is torch.Tensor and not out.requires_grad
    assert_same_bits(out, the_long_way(query, key, value))
    recorded = plain.attend(query, torch.nn.Parameter(key), value, False, None, False)
    assert recorded.requires_grad and torch.equal(recorded, out)


@pytest.mark.parametrize("table", [True, False], ids=["table", "attributes"])
def test_both_ways_to_read_a_tensor(table: bool) -> None:
    """Through DLPack's table, where torch has it, and through attributes."""
    found = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    hidden = "" if table else "torch.Tensor.__dlpack_c_exchange_api__ = None"
    code = f"""
        import torch
        {hidden}
        import fastattn.torch
        from fastattn.backends import plain
        query = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16)
        keys = torch.randn(2, 4, 3, 8, dtype=torch.bfloat16).transpose(1, 2)[:, :, 1:]
        out = plain.attend(query, keys, keys, True, None, False)
        assert out.equal(fastattn.attention(query, keys, keys, causal=True, softcap=0))
        for odd in query.to_sparse(), query.to("meta"), query.int(), query[0], query.real.conj():
            taken = plain.attend(odd, keys, keys, True, None, False)
            assert (taken is None) == (odd is not query), odd
        print("read")
    """
    assert found or not table or torch.__version__ < "2.10"
    assert output_of(code) == "read"
