"""The portable forward against the float64 oracle: every argument, dtype and shape."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bounds
import shapes
from fastattn.gpu.configs import INTERPRETED
from fastattn.gpu.decode import decode
from fastattn.gpu.forward import forward
from fastattn.philox import kept
from fences import Fence
from portable import DTYPES, Results, assert_right, attend, call_of, check_case
from shapes import ARRAYS, Case, convert

LARGEST = 256  # head dimension of the portable kernels
CASES = tuple(case for case in shapes.SMALL if max(case.head_dim, case.value_dim) <= LARGEST)
QUICK = (*shapes.TINY, *shapes.EMPTY, *shapes.OPTIONS, *shapes.LENGTHS[:4], shapes.GROUPS[2])
SHARP = 10.0  # times a normal query: logits up to 50 either way
WIDE = Case("wide", 37, 83, 24, batch=2, query_heads=4, kv_heads=2)
LOWEST = {name: torch.finfo(getattr(torch, name)).min for name in DTYPES}

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@dtypes
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_every_feature(case: Case, dtype: str) -> None:
    check_case(case, dtype)


@pytest.mark.gpu_slow
@dtypes
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=str)
def test_every_shape(case: Case, dtype: str) -> None:
    check_case(case, dtype)


@pytest.mark.gpu_slow
@dtypes
@pytest.mark.parametrize("case", shapes.OPTIONS, ids=str)
def test_logits_up_to_50(case: Case, dtype: str) -> None:
    check_case(case, dtype, spread=SHARP)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("arrays", [(), ("bias", "alibi_slopes")], ids=["plain", "adjusted"])
def test_scales(scale: float, arrays: tuple[str, ...]) -> None:
    case = Case("scaled", 40, 100, 24, query_heads=2, kv_heads=1, causal=True, arrays=arrays)
    check_case(case, "float32", scale=scale)


def test_scores_of_a_few_hundredths_of_a_softcap() -> None:
    """They keep their digits, where differences of exponentials have few."""
    query, one = torch.linspace(2, 4, 64).view(1, 1, 64, 1), torch.ones(1, 1, 1, 1)
    options = {"softcap": 50.0, "scale": 1.0}
    assert_right(attend(query, one, one, **options), bounds.expect(query, one, one, **options), "float32")


class TestWindow:
    """Tiles that all, some or none of the rows see, on either side."""

    @pytest.mark.parametrize(
        "window", [(0, 0), (5, 0), (0, 5), (13, 29), (None, 3), (3, None), (70, 70)], ids=str
    )
    @pytest.mark.parametrize("offset", [0, 45, -30, 2**60, -(2**60), 2**31 - 1, -(2**31)])
    def test_both_sides(self, window: Any, offset: int) -> None:
        check_case(Case("band", 70, 120, 16), "float32", window=window, query_offset=offset)

    @pytest.mark.parametrize("causal", [True, "top_left"])
    @pytest.mark.parametrize("offsets", [None, [3, -20], [2**60, -(2**60)]], ids=str)
    def test_offsets_of_sequences(self, causal: bool | str, offsets: list[int] | None) -> None:
        case = Case("offsets", 70, 120, 16, batch=2, arrays=("kv_lengths",))
        check_case(case, "float32", causal=causal, query_offset=offsets)
        check_case(case, "float32", causal=causal, query_offset=offsets, window=(33, 4))


class TestBias:
    SHAPES = ((83,), (37, 1), (4, 1, 83), (2, 1, 37, 83), (2, 4, 1, 1), (2, 4, 37, 83))

    @pytest.mark.parametrize(("dtype", "own"), [("float32", True), ("float16", False), ("bfloat16", True)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_broadcasts(
        self, shape: tuple[int, ...], own: bool, dtype: str, rng: np.random.Generator
    ) -> None:
        bias = rng.standard_normal(shape) * 3
        bias[bias < -3] = -np.inf
        check_case(WIDE, dtype, bias=convert(bias, dtype if own else "float32", "torch"))

    @dtypes
    def test_rows_of_the_lowest_number_give_the_mean(self, dtype: str) -> None:
        """finfo.min is a value: such a row is the mean of V, beside rows that have more to choose from."""
        bias = torch.zeros(37, 83, dtype=getattr(torch, dtype))
        bias[::3] = LOWEST[dtype]
        bias[1::3, :70] = LOWEST[dtype]
        bias[5] = -torch.inf
        check_case(WIDE, dtype, bias=bias)

    @dtypes
    @pytest.mark.parametrize("level", [1.5e8, -2e8, 1e30, -3e38])
    def test_a_constant_far_from_zero_gives_the_mean(self, level: float, dtype: str) -> None:
        query, key, value = WIDE.tensors(dtype, "torch")
        out = attend(query, key, value, bias=torch.full((83,), level)).out.double()
        mean = value.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(out.shape)
        torch.testing.assert_close(out, mean, rtol=0, atol=2.0**-8 if "16" in dtype else 1e-6)


@pytest.mark.parametrize("scaling", [{"scale": 1e-46}, {"softcap": 1e39}, {"softcap": 1e-46}], ids=str)
def test_numbers_beyond_float32(scaling: dict[str, float]) -> None:
    check_case(Case("beyond", 20, 64, 16, causal=True), "float32", **scaling)


@dtypes
@pytest.mark.parametrize(("run", "keys"), [(forward, 64), (decode, 600)])
@pytest.mark.parametrize("offset", [10_000, 10_000_000, -10_000_000])
def test_alibi_far_from_the_keys(offset: int, run: Any, keys: int, dtype: str) -> None:
    """Only distances among the keys matter to the output, however far the query stands."""
    query, key, value = Case("far", 20, keys, 16, query_heads=2).tensors(dtype, "torch")
    options = {"alibi_slopes": torch.tensor([0.5, 0.03]), "query_offset": offset}
    expected = bounds.expect(query, key, value, **options)
    actual = attend(query, key, value, run=run, **options)
    out = actual.out.double().numpy()
    np.testing.assert_allclose(out, expected.out, rtol=0, atol=3e-2 if "16" in dtype else 3e-6)
    np.testing.assert_allclose(actual.lse.numpy(), expected.lse, rtol=1e-6)


class TestMask:
    SHAPES = ((), (83,), (37, 1), (4, 1, 83), (2, 1, 37, 83), (2, 4, 37, 1), (1, 4, 1, 1), (2, 4, 37, 83))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_broadcasts(self, shape: tuple[int, ...], rng: np.random.Generator) -> None:
        check_case(WIDE, "float32", mask=torch.as_tensor(rng.random(shape) < 0.6))

    @dtypes
    def test_whole_tiles_and_rows(self, dtype: str, rng: np.random.Generator) -> None:
        mask = torch.as_tensor(rng.random((2, 4, 37, 83)) < 0.5)
        mask[..., 32:64] = False  # a tile that nobody sees
        mask[0, 1] = False  # a head that sees nothing
        mask[1, :, 11:14] = False
        check_case(WIDE, dtype, mask=mask, causal="top_left", query_offset=40)


class TestDropout:
    """With the unit matrix for values, the output is the weights."""

    @pytest.mark.parametrize(
        ("dtype", "seed"),
        [("float32", 0), ("float32", 2**31), ("float16", 2**63 + 5), ("bfloat16", 2**64 - 1)],
    )
    def test_the_same_weights_stay_as_everywhere(self, seed: int, dtype: str) -> None:
        case = Case("dropout", 40, 77, 16, 77, batch=2, query_heads=3, kv_heads=1)
        query, key, _ = case.tensors(dtype, "torch")
        value = torch.eye(77, dtype=query.dtype).expand(2, 1, 77, 77)
        options = {"dropout_p": 0.4, "dropout_seed": seed, "dropout_offset": 2**32 - 2}
        actual = attend(query, key, value, **options)
        heads = np.arange(6).reshape(2, 3)
        stays = kept(0.4, seed, 2**32 - 2, heads, 40, 77)
        np.testing.assert_array_equal(actual.out.double().numpy() != 0, stays)
        assert_right(actual, bounds.expect(query, key, value, **options), dtype)

    @pytest.mark.parametrize("p", [0.1, 1.0])
    def test_meets_the_other_rules(self, p: float) -> None:
        arrays = ("mask", "bias", "alibi_slopes", "sinks")
        case = Case("drop", 40, 130, 24, 40, batch=2, query_heads=4, kv_heads=2, softcap=2.0, arrays=arrays)
        check_case(case, "float32", dropout_p=p, dropout_seed=11, dropout_offset=3)

    def test_a_seed_in_memory_is_that_seed(self) -> None:
        tensors = WIDE.tensors("float32", "torch")
        call = call_of(*tensors, dropout_p=0.5, dropout_seed=2**63 + 5)
        drawn = call._replace(dropout_seed=torch.tensor(5 - 2**63))
        first, second = (torch.empty(2, 4, 37, 24) for _ in range(2))
        forward(call, first, None)
        forward(drawn, second, None)
        assert torch.equal(first, second)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads and rows swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows and columns swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "inside a larger one": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "one head for all": lambda x: x[:, :1].expand(x.shape),
    "one row for all": lambda x: x[:, :, :1].expand(x.shape),
}


@dtypes
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view: Callable[[Tensor], Tensor], dtype: str) -> None:
    query, key, value = map(view, WIDE.tensors(dtype, "torch"))
    options = {
        "causal": True,
        "bias": view(torch.randn(WIDE.scores_shape)),
        "mask": view(torch.rand(WIDE.scores_shape) < 0.8),
    }
    assert_right(attend(query, key, value, **options), bounds.expect(query, key, value, **options), dtype)


def test_writes_through_strides() -> None:
    tensors = WIDE.tensors("float32", "torch")
    expected = attend(*tensors).out
    memory = torch.full((2, 37, 4, 60), 7.0)
    out = memory[..., 3:51:2].transpose(1, 2)
    forward(call_of(*tensors), out, None)
    assert torch.equal(out, expected)
    assert (memory[..., 4:51:2] == 7).all() and (memory[..., :3] == 7).all() and (memory[..., 51:] == 7).all()


HIDING: dict[str, tuple[dict[str, Any], list[slice]]] = {
    "lengths": ({"kv_lengths": [40, 71]}, [slice(40, None), slice(71, None)]),
    "one length": ({"kv_lengths": [0, 33]}, [slice(0, None), slice(33, None)]),
    "causal": ({"causal": True, "query_offset": 10}, [slice(64, None), slice(64, None)]),
    "window": ({"window": (7, 0), "query_offset": 90}, [slice(0, 64), slice(0, 64)]),
}


class TestPoison:
    """What lies where nobody may look changes no bit: past lengths, and in tiles dead for all rows."""

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    @pytest.mark.parametrize("rule", HIDING)
    def test_changes_no_bit(self, rule: str, softcap: float, poison: float) -> None:
        options, hidden = HIDING[rule]
        query, key, value = Case("poison", 33, 130, 16, batch=2, query_heads=2).tensors("float32", "torch")
        clean = attend(query, key, value, softcap=softcap, **options)
        for b, places in enumerate(hidden):
            key[b, :, places], value[b, :, places] = poison, poison
        for actual, expected in zip(
            attend(query, key, value, softcap=softcap, **options), clean, strict=True
        ):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("target", ["query", "key", "value"])
    def test_nan_reaches_whoever_sees_it(self, target: str) -> None:
        case = Case("seen", 70, 70, 16)
        tensors = dict(zip(("query", "key", "value"), case.tensors("float32", "torch"), strict=True))
        tensors[target][:, :, 40] = torch.nan
        out = attend(**tensors).out
        spoiled = out.isnan().any(-1).flatten()
        expected = torch.arange(70) == 40 if target == "query" else torch.ones(70, dtype=torch.bool)
        assert torch.equal(spoiled, expected)


class TestAhead:
    """Products that begin a turn before their exponentials are the same products."""

    AHEAD = INTERPRETED._replace(ahead=True)

    @pytest.mark.parametrize(
        "options",
        [{}, {"causal": True}, {"window": (70, 20)}, {"kv_lengths": [31, 149]}, {"softcap": 3.0}],
        ids=str,
    )
    def test_changes_no_bit(self, options: dict[str, Any]) -> None:
        tensors = Case("ahead", 37, 150, 24, batch=2, query_heads=2, kv_heads=1).tensors("bfloat16", "torch")
        early = attend(*tensors, run=partial(forward, tiles=self.AHEAD), **options)
        for actual, expected in zip(early, attend(*tensors, **options), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("keys", [1, 64, 83])
    @pytest.mark.parametrize("place", ["start", "end"])
    def test_keeps_to_memory(self, place: Any, keys: int) -> None:
        call = call_of(*Case("fenced", 37, keys, 32, causal=True).tensors("float32", "torch"))
        TestMemory().run(call, place, torch.float32, self.AHEAD)


class TestMemory:
    """Every buffer of a call lies between two pages that end the process when touched."""

    @dtypes
    @pytest.mark.parametrize("place", ["start", "end"])
    @pytest.mark.parametrize("dim", [20, 32])
    def test_is_kept_to(self, place: Any, dim: int, dtype: str) -> None:
        arrays = tuple(name for name in ARRAYS if name != "padding")
        case = Case(
            "fenced", 37, 83, dim, 17, batch=2, query_heads=4, kv_heads=2, window=(60, 9), arrays=arrays
        )
        call = call_of(*case.tensors(dtype, "torch"), **case.options(dtype, "torch"), dropout_p=0.1)
        self.run(call, place, getattr(torch, dtype))

    @pytest.mark.parametrize("lengths", [[-5, 10**12], [-(2**63), 2**63 - 1]], ids=str)
    @pytest.mark.parametrize("offsets", [[0, 40], [-(2**60), 2**60]], ids=str)
    @pytest.mark.parametrize("window", [None, (20, 0)], ids=str)
    def test_whatever_lengths_and_offsets_hold(
        self, window: Any, offsets: list[int], lengths: list[int]
    ) -> None:
        """They are clamped to the keys there are."""
        case = Case("values", 37, 83, 16, batch=2, window=window, causal=True)
        tensors, options = case.tensors("float32", "torch"), case.options("float32", "torch")
        call = call_of(*tensors, **options, query_offset=offsets)
        actual = self.run(call._replace(kv_lengths=torch.tensor(lengths)), "end", torch.float32)
        expected = bounds.expect(*tensors, **options, query_offset=offsets, kv_lengths=[0, 83])
        assert_right(actual, expected, "float32")

    def run(self, call: Any, place: Any, dtype: torch.dtype, tiles: Any = None) -> Results:
        out = torch.zeros(*call.query.shape[:3], call.value.shape[3], dtype=dtype)
        lse = torch.zeros(call.query.shape[:3])
        fences: list[Fence] = []

        def fenced(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            size = value.element_size()
            reach = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            fences.append(Fence(value.data_ptr(), reach * size, place, writable=True))
            memory = (ctypes.c_char * (reach * size)).from_address(fences[-1].address)
            return torch.frombuffer(memory, dtype=value.dtype).as_strided(value.shape, value.stride())

        results = Results(fenced(out), fenced(lse))
        forward(type(call)(*map(fenced, call)), *results, tiles)
        for fence in fences[:2]:
            fence.copy_back()
        for fence in fences:
            fence.close()
        return Results(out, lse)
