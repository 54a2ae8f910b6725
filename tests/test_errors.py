"""Every wrong call has an error that names the argument, what it got and what was expected."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastattn as fa
from fastattn import reference
from fastattn.backends import cpu

# query (2, 4, 5, 8), key (2, 2, 7, 8), value (2, 2, 7, 6)
QUERY = np.zeros((2, 4, 5, 8), np.float32)
KEY = np.zeros((2, 2, 7, 8), np.float32)
VALUE = np.zeros((2, 2, 7, 6), np.float32)
OUT_SHAPE = (2, 4, 5, 6)


def call(library: str = "numpy", **changes: Any) -> Any:
    """A right call, save for `changes`."""
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": VALUE}
    if library == "torch":
        arguments = {name: torch.from_numpy(array) for name, array in arguments.items()}
    arguments |= {"backend": "reference"} | changes
    return fa.attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def test_the_right_call_is_right() -> None:
    assert call().shape == OUT_SHAPE
    assert call("torch").shape == OUT_SHAPE


TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"query": [[1.0]]}, "query must be a NumPy array or a torch tensor, got list"),
    "none": ({"key": None}, "key must be a NumPy array like the first argument, got NoneType"),
    "torch-key": (
        {"key": torch.from_numpy(KEY)},
        "key must be a NumPy array like the first argument, got torch.Tensor",
    ),
    "torch-mask": (
        {"mask": torch.ones(5, 7) > 0},
        "mask must be a NumPy array like the first argument, got torch.Tensor",
    ),
    "list-mask": ({"mask": [True]}, "mask must be a NumPy array like the first argument, got list"),
    "masked": (
        {"value": np.ma.array(VALUE)},
        "value must be a NumPy array of no subclass, got numpy.ma",
    ),
    "int": (
        {"query": QUERY.astype(int)},
        "query must be one of float64, float32, bfloat16, float16, got int64",
    ),
    "complex": ({"query": QUERY.astype(complex)}, "query must be one of .*, got complex128"),
    "float8": (
        {"query": QUERY.astype(ml_dtypes.float8_e4m3fn)},
        "query must be one of .*, got float8_e4m3fn",
    ),
    "mixed": (
        {"key": KEY.astype(np.float64)},
        "query, key and value must have one dtype, got float32, float64 and float32",
    ),
    "byte-order": (
        {"query": QUERY.astype(">f4")},
        "query must be in the machine's byte order, got dtype '>f4'",
    ),
    "float-mask": (
        {"mask": zeros(5, 7)},
        r"mask must be bool \(True: attend\), got float32: pass values to add to the scores as `bias`",
    ),
    "int-mask": (
        {"mask": zeros(5, 7, dtype=np.uint8)},
        "mask must be bool .*, got uint8: compare with 0 first",
    ),
    "bool-bias": (
        {"bias": zeros(5, 7, dtype=bool)},
        r"bias must be float32, got bool \(a bool goes to `mask`\)",
    ),
    "double-bias": ({"bias": zeros(5, 7, dtype=float)}, "bias must be float32, got float64"),
    "causal": ({"causal": 1}, "causal must be a bool, 'bottom_right' or 'top_left', got int"),
    "window": ({"window": 3}, r"window must be a pair \(left, right\), got int"),
    "window-float": ({"window": (1.5, 0)}, "window must hold integers or None, got float"),
    "window-bool": ({"window": (True, 0)}, "window must hold integers or None, got bool"),
    "lengths-float": ({"kv_lengths": [1.0, 2.0]}, "kv_lengths must hold integers, got float64"),
    "lengths-int": ({"kv_lengths": 3}, "kv_lengths must be a NumPy array like the first argument, got int"),
    "starts-float": ({"kv_starts": [1.0, 2.0]}, "kv_starts must hold integers, got float64"),
    "segments-one": ({"segment_ids": 3}, r"segment_ids must be a pair \(query_ids, key_ids\), got int"),
    "segments-float": (
        {"segment_ids": ([[0.5] * 5] * 2, [[0] * 7] * 2)},
        r"segment_ids\[0\] must hold integers, got float64",
    ),
    "offset-bool": (
        {"query_offset": True},
        "query_offset must be a NumPy array like the first argument, got bool",
    ),
    "offset-float": (
        {"query_offset": 1.0},
        "query_offset must be a NumPy array like the first argument, got float",
    ),
    "slopes-bool": ({"alibi_slopes": [True] * 4}, "alibi_slopes must hold real numbers, got bool"),
    "sinks-complex": ({"sinks": [1j] * 4}, "sinks must hold real numbers, got complex128"),
    "scale-bool": ({"scale": True}, "scale must be a real number, got bool"),
    "scale-str": ({"scale": "1"}, "scale must be a real number, got str"),
    "dropout-bool": ({"dropout_p": True}, "dropout_p must be a real number, got bool"),
    "dropout-str": ({"dropout_p": "0.1"}, "dropout_p must be a real number, got str"),
    "dropout-array": ({"dropout_p": zeros(2)}, "dropout_p must be a real number, got numpy.ndarray"),
    "seed-float": ({"dropout_seed": 1.0}, "dropout_seed must be an integer, got float"),
    "seed-bool": ({"dropout_seed": True}, "dropout_seed must be an integer, got bool"),
    "offset-none": ({"dropout_offset": None}, "dropout_offset must be an integer, got NoneType"),
    "softcap-none": ({"softcap": None}, "softcap must be a real number, got NoneType"),
    "lse-flag": ({"return_lse": 1}, "return_lse must be a bool, got int"),
    "weights-flag": ({"return_weights": "yes"}, "return_weights must be a bool, got str"),
    "out": ({"out": [0.0]}, "out must be a NumPy array like the first argument, got list"),
    "out-dtype": (
        {"out": zeros(*OUT_SHAPE, dtype=float)},
        "out must have query's dtype float32, got float64",
    ),
    "backend": ({"backend": 3}, "backend must be a name or None, got int"),
    "layout": ({"layout": zeros(2)}, "layout must be 'bhsd' or 'bshd', got numpy.ndarray"),
}

VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": zeros(4, 5, 8)}, r"must have 4 axes \(batch, heads, length, dim\), got 3, 4 and 4"),
    "rank-bshd": (
        {"value": zeros(7, 6), "layout": "bshd"},
        r"must have 4 axes \(batch, length, heads, dim\), got 4, 4 and 2",
    ),
    "batch": ({"key": zeros(1, 2, 7, 8)}, "query, key and value must have one batch size, got 2, 1 and 2"),
    "heads": (
        {"key": zeros(2, 4, 7, 8)},
        "key and value must have the same heads and length, got 4 heads of",
    ),
    "length": (
        {"value": zeros(2, 2, 9, 6)},
        "key and value must have the same heads and length, got 2 heads of length 7 and 2 heads of length 9",
    ),
    "head-dim": ({"query": zeros(2, 4, 5, 9)}, "query and key must have one head dimension, got 9 and 8"),
    "no-head-dim": (
        {"value": zeros(2, 2, 7, 0)},
        "head dimensions must be at least 1, got 8 for query and 0 for value",
    ),
    "group": (
        {"query": zeros(2, 3, 5, 8)},
        "query's heads must be a positive multiple of key's heads, got 3 and 2",
    ),
    "no-heads": ({"query": zeros(2, 0, 5, 8)}, "must be a positive multiple of key's heads, got 0 and 2"),
    "layout": ({"layout": "sbhd"}, "layout must be 'bhsd' or 'bshd', got 'sbhd'"),
    "causal": ({"causal": "lower"}, "causal must be a bool, 'bottom_right' or 'top_left', got 'lower'"),
    "window-three": ({"window": (1, 2, 3)}, r"window must be a pair \(left, right\), got 3 elements"),
    "window-negative": (
        {"window": (-1, 0)},
        r"window must hold integers from 0 up, or None, got \(-1, 0\)",
    ),
    "mask-shape": (
        {"mask": zeros(5, 8, dtype=bool)},
        r"mask must broadcast to \(batch, query heads, queries, keys\) = \(2, 4, 5, 7\), got shape \(5, 8\)",
    ),
    "mask-rank": (
        {"mask": zeros(1, 1, 1, 5, 7, dtype=bool)},
        r"mask must broadcast to .*, got shape \(1, 1, 1, 5, 7\)",
    ),
    "bias-kv-heads": ({"bias": zeros(2, 5, 7)}, r"bias must broadcast to .*, got shape \(2, 5, 7\)"),
    "lengths-shape": ({"kv_lengths": [7]}, r"kv_lengths must have shape \(2,\), got \(1,\)"),
    "lengths-high": ({"kv_lengths": [7, 8]}, "kv_lengths must be from 0 to key's length 7, got 8 at index 1"),
    "lengths-low": (
        {"kv_lengths": [-1, 7]},
        "kv_lengths must be from 0 to key's length 7, got -1 at index 0",
    ),
    "lengths-huge": (
        {"kv_lengths": np.array([2**64 - 1, 0], np.uint64)},
        "kv_lengths must be from 0 to key's length 7, got 18446744073709551615 at index 0",
    ),
    "starts-high": ({"kv_starts": [8, 0]}, "kv_starts must be from 0 to key's length 7, got 8 at index 0"),
    "query-lengths-high": (
        {"query_lengths": [5, 6]},
        "query_lengths must be from 0 to query's length 5, got 6 at index 1",
    ),
    "segments-large": (
        {"segment_ids": (np.full((2, 5), 2**64 - 1, np.uint64), np.zeros((2, 7), int))},
        r"segment_ids\[0\] must be int64, got 18446744073709551615",
    ),
    "segments-three": (
        {"segment_ids": ([], [], [])},
        r"segment_ids must be a pair \(query_ids, key_ids\), got 3 elements",
    ),
    "segments-shape": (
        {"segment_ids": ([[0] * 5] * 2, [[0] * 5] * 2)},
        r"segment_ids\[1\] must have shape \(2, 7\), got \(2, 5\)",
    ),
    "offset-shape": ({"query_offset": [1, 2, 3]}, r"query_offset must have shape \(2,\), got \(3,\)"),
    "offset-huge": (
        {"query_offset": -(2**61)},
        r"query_offset must be within 2\*\*60 of 0, got -2305843009213693952",
    ),
    "offsets-huge": ({"query_offset": [0, 2**61]}, r"query_offset must be within 2\*\*60 of 0"),
    "slopes-shape": (
        {"alibi_slopes": [1.0, 2.0]},
        r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(2,\)",
    ),
    "slopes-ragged": (
        {"alibi_slopes": [1.0, [2.0]]},
        "alibi_slopes must be a flat sequence of numbers: .*inhomogeneous",
    ),
    "slopes-nan": ({"alibi_slopes": [1.0, np.nan, 1.0, 1.0]}, "alibi_slopes must be finite, got nan"),
    "sinks-shape": ({"sinks": [1.0]}, r"sinks must have shape \(4,\), got \(1,\)"),
    "sinks-nan": (
        {"sinks": [0.0, np.nan, 0, 0]},
        "sinks must be finite, or -inf for a head without one, got nan",
    ),
    "sinks-inf": (
        {"sinks": [0.0, np.inf, 0, 0]},
        "sinks must be finite, or -inf for a head without one, got inf",
    ),
    "scale-nan": ({"scale": float("nan")}, "scale must be finite, got nan"),
    "scale-inf": ({"scale": np.float32("inf")}, "scale must be finite, got inf"),
    "dropout-negative": ({"dropout_p": -0.1}, "dropout_p must be from 0 to 1, got -0.1"),
    "dropout-above": ({"dropout_p": 1.5}, "dropout_p must be from 0 to 1, got 1.5"),
    "dropout-nan": ({"dropout_p": float("nan")}, "dropout_p must be finite, got nan"),
    "seed-negative": ({"dropout_seed": -1}, r"dropout_seed must be from 0 to 2\*\*64 - 1, got -1"),
    "seed-huge": (
        {"dropout_seed": 2**64},
        r"dropout_seed must be from 0 to 2\*\*64 - 1, got 18446744073709551616",
    ),
    "offset-high": (
        {"dropout_offset": 2**32},
        r"dropout_offset must be from 0 to 2\*\*32 - 1, got 4294967296",
    ),
    "softcap-negative": ({"softcap": -1}, r"softcap must be at least 0 \(0: none\), got -1.0"),
    "softcap-nan": ({"softcap": float("nan")}, "softcap must be finite, got nan"),
    "out-shape": ({"out": zeros(2, 4, 5, 8)}, r"out must have shape \(2, 4, 5, 6\), got \(2, 4, 5, 8\)"),
    "out-read-only": ({"out": read_only(zeros(*OUT_SHAPE))}, "out must be writable, got a read-only array"),
    "out-negative": (
        {"out": zeros(*OUT_SHAPE)[::-1]},
        "out must have non-negative strides of whole items, got",
    ),
    "backend": ({"backend": "gpu"}, "backend='gpu' is unknown; expected one of 'cpu', 'triton'"),
}


@pytest.mark.parametrize("changes, message", TYPES.values(), ids=TYPES)
def test_type_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(**changes)


@pytest.mark.parametrize("changes, message", VALUES.values(), ids=VALUES)
def test_value_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


DROPOUT = {
    name: row for name, row in {**TYPES, **VALUES}.items() if next(iter(row[0])).startswith("dropout_")
}


@pytest.mark.parametrize("changes, message", DROPOUT.values(), ids=DROPOUT)
def test_arguments_of_dropout_are_checked_where_nothing_is_dropped(
    changes: dict[str, Any], message: str
) -> None:
    """By the short way of plain calls too."""
    with pytest.raises((TypeError, ValueError), match=message):
        fa.attention(QUERY, KEY, VALUE, **changes)


@pytest.mark.parametrize(
    "query, key, value, message",
    [
        (
            (1, 1 << 20, 1 << 20, 1),
            (1, 1, 1, 1),
            (1, 1, 1, 1 << 22),
            "out .* would take 18446744073709551616 bytes",
        ),
        ((1, 1, 1 << 61, 1), (1, 1, 1, 1), (1, 1, 1, 1), "lse .* would take 9223372036854775808 bytes"),
        (
            (1, 1, 1 << 31, 1),
            (1, 1, 1 << 31, 1),
            (1, 1, 1 << 31, 1),
            "weights .* would take 9223372036854775808 bytes",
        ),
    ],
    ids=["out", "lse", "weights"],
)
def test_sizes_overflow_before_anything_is_allocated(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], message: str
) -> None:
    """Expanded views of one element, so the sizes exist without the memory."""
    dtype = (
        np.float32 if message.startswith("out") else np.float16
    )  # a float16 lse is larger than its float16 out
    one = np.zeros(1, dtype)
    arrays = {"query": np.broadcast_to(one, query), "key": np.broadcast_to(one, key)}
    with pytest.raises(ValueError, match=message):
        call(**arrays, value=np.broadcast_to(one, value), return_lse=True, return_weights=True)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_out_overlaps_an_input(name: str) -> None:
    memory = zeros(2 * 4 * 5 * 7 * 8)
    shapes = {"query": QUERY.shape, "key": KEY.shape, "value": VALUE.shape, "bias": (2, 4, 5, 7)}
    shared = memory[: np.prod(shapes[name])].reshape(shapes[name])
    with pytest.raises(ValueError, match=f"out must not overlap {name}: they share memory"):
        call(**{name: shared}, out=memory[: np.prod(OUT_SHAPE)].reshape(OUT_SHAPE))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_beside_the_inputs_in_one_buffer_is_fine(library: str) -> None:
    packed = np.zeros((2, 5, 4, 4, 8), np.float32)  # (batch, length, one of q, k, v and out, heads, dim)
    packed[:, :, 2] = 1
    slots = packed if library == "numpy" else torch.from_numpy(packed)
    query, key, value, out = (slots[:, :, slot] for slot in range(4))
    assert fa.attention(query, key, value, layout="bshd", out=out, backend="reference") is out
    assert (packed[:, :, 3] == 1).all()


def test_out_overlaps_itself() -> None:
    out = torch.zeros(2, 4, 1, 6).expand(OUT_SHAPE)
    with pytest.raises(ValueError, match=re.escape("out must not overlap itself, got shape (2, 4, 5, 6)")):
        call("torch", out=out)


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks", "alibi_slopes"])
def test_nothing_is_written_to_out_in_a_graph(name: str, backend: str) -> None:
    shapes = {"query": QUERY.shape, "key": KEY.shape, "value": VALUE.shape, "bias": (5, 7)}
    tensor, out = torch.zeros(shapes.get(name, (4,)), requires_grad=True), torch.ones(OUT_SHAPE)
    messages = {
        "cpu": f"{name} requires grad, and this call computes no gradient of it: call it under",
        "math": "out cannot be written where another argument requires grad",
    }
    with pytest.raises(RuntimeError, match=messages[backend]):
        call("torch", backend=backend, **{name: tensor}, out=out)
    assert (out == 1).all()
    with torch.no_grad():
        assert call("torch", backend=backend, **{name: tensor}, out=out) is out
    assert not (out == 1).all()
    with pytest.raises(RuntimeError, match=r"out requires grad, and would be overwritten: pass out.detach"):
        call("torch", backend=backend, out=torch.zeros(OUT_SHAPE, requires_grad=True))


def test_math_asks_for_tensors() -> None:
    with pytest.raises(NotImplementedError, match="math: it composes operations of torch: pass tensors"):
        call(backend="math")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": QUERY}, TypeError, "key must be a NumPy array like the first argument, got torch.Tensor"),
        ({"key": KEY}, TypeError, "key must be a torch tensor like the first argument, got numpy.ndarray"),
        ({"sinks": np.zeros(4)}, TypeError, "sinks must be a torch tensor like the first argument"),
        ({"sinks": torch.full((4,), torch.nan)}, ValueError, "sinks must be finite, or -inf for a head"),
        ({"query": torch.zeros(QUERY.shape).to_sparse()}, TypeError, "query must be a dense tensor"),
        ({"return_lse": 1}, TypeError, "return_lse must be a bool, got int"),
        ({"out": torch.zeros(1)}, ValueError, r"out must have shape \(2, 4, 5, 6\), got \(1,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_math_validates_alike(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call("torch", backend="math", **changes)


def test_forward_mode_gradients_are_not_there_yet() -> None:
    query = torch.from_numpy(QUERY)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, query)
        with pytest.raises(RuntimeError, match="query requires grad"):
            call("torch", query=dual)
        call("torch")


def test_inside_transforms() -> None:
    """The operator that is behind them checks its arguments alike."""
    query = torch.from_numpy(QUERY)
    with pytest.raises(ValueError, match=r"must have 4 axes .*, got 3, 4 and 4"):
        torch.vmap(lambda q: call("torch", query=q).sum())(query)
    with pytest.raises(NotImplementedError, match="backend 'reference' computes no gradients"):
        torch.func.grad(lambda q: call("torch", query=q).sum())(query)


class Subclass(torch.Tensor):
    pass


def test_tensors_that_cannot_be_read() -> None:
    query = torch.from_numpy(QUERY)
    with pytest.raises(RuntimeError, match="query is on device 'meta', expected 'cpu' or 'cuda': backend='m"):
        call("torch", query=query.to("meta"))
    with pytest.raises(RuntimeError, match="value is on device 'meta', expected 'cpu': the tensors"):
        call("torch", value=torch.from_numpy(VALUE).to("meta"))
    with pytest.raises(RuntimeError, match="kv_lengths is on device 'meta', expected 'cpu'"):
        call("torch", kv_lengths=torch.ones(QUERY.shape[0], dtype=torch.int64, device="meta"))
    with pytest.raises(
        TypeError, match=r"query must be a torch tensor of no subclass, got test_errors.Subclass"
    ):
        call("torch", query=query.as_subclass(Subclass))
    with pytest.raises(
        TypeError, match=r"query must be a dense tensor \(torch.strided\), got layout torch.sparse_coo"
    ):
        call("torch", query=query.to_sparse())
    with pytest.raises(
        TypeError, match=r"key must be a torch tensor like the first argument, got numpy.ndarray"
    ):
        call("torch", key=KEY)


def test_tensors_that_can_be_read() -> None:
    with torch.no_grad():
        assert type(call("torch", query=torch.nn.Parameter(torch.from_numpy(QUERY)))) is torch.Tensor
    value = torch.complex(torch.zeros(VALUE.shape), torch.ones(VALUE.shape)).conj().imag
    assert value.is_neg()
    assert (call("torch", value=value) == -1).all()


def test_the_gpu_backend_asks_for_tensors_on_a_gpu() -> None:
    with pytest.raises(NotImplementedError, match="triton: NumPy arrays are not on a GPU: pass CUDA tensors"):
        call(backend="triton")


def test_unknown_backend_in_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FASTATTN_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="FASTATTN_BACKEND='gpu' is unknown; expected one of 'cpu', 'triton'"
    ):
        call(backend=None)
    assert call(backend="reference").shape == OUT_SHAPE


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing falls back in silence: every backend is listed with its reasons."""
    wide = zeros(1, 1, 2, 577)
    for backend in ("cpu", None):
        with pytest.raises(NotImplementedError, match="no backend can run this call") as caught:
            fa.attention(wide, wide, wide, backend=backend)
        assert "cpu: " in str(caught.value)
        assert "head dimension 577 is more than 576" in str(caught.value)
        assert "value's head dimension 577 is more than 512" in str(caught.value)
        assert "reference: runs only as backend='reference'" in str(caught.value)
    monkeypatch.setattr(cpu, "_missing", "the compiled extension cannot be loaded: no such file")
    with pytest.raises(
        NotImplementedError, match="cpu: the compiled extension cannot be loaded: no such file"
    ):
        call(backend="cpu")
    assert reference.attention(wide, wide, wide).out.shape == wide.shape
