"""Caches that are tensors: the operator, compiled and watched; graphs, inference mode, counts of changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastattn as fa
import fastattn.torch
from caches import FEATURES, Setting, as_numpy, as_torch, make
from kernels import assert_same_bits

CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")
SETTINGS = {
    "whole": Setting(library="torch"),
    "rotary": Setting("bfloat16", library="torch", rotary="halves"),
    "paged": Setting(library="torch", page_size=7, rotary="interleaved"),
    "int8": Setting(library="torch", cache_dtype="int8"),
    "paged-float8": Setting(library="torch", cache_dtype="float8_e4m3fn", page_size=7),
    "ring": Setting(library="torch", lengths=(3, 90, 50), rolling=True, options={"window": (20, 0)}),
    "bhsd": Setting(library="torch", layout="bhsd", options=FEATURES["all"]),
    "no-append": Setting(library="torch", added=0, lengths=(3, 5, 37)),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def twice(name: str, rng: np.random.Generator) -> tuple[Any, Any]:
    state = rng.bit_generator.state
    first, _ = make(SETTINGS[name], rng)
    rng.bit_generator.state = state
    return first, make(SETTINGS[name], rng)[0]


@pytest.mark.parametrize("name", ["whole", "paged", "paged-float8", "ring"])
def test_compiled_in_one_graph(name: str, rng: np.random.Generator) -> None:
    """Between operations of torch, which see what was written."""
    call, other = twice(name, rng)

    def step(arrays: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
        arrays = arrays | {"query": arrays["query"] * 2}
        out, lse = fa.attention_with_kvcache(**arrays, **options, return_lse=True)
        first = arrays["key_cache"].flatten()[:1]
        return out + 1, lse, first.clone()

    torch._dynamo.reset()
    with torch.no_grad():
        expected = step(call.arrays, call.options)
        backend = (
            "inductor" if name == "paged" else "aot_eager"
        )  # which compiles nothing further, and is quick
        results = torch.compile(step, fullgraph=True, backend=backend)(other.arrays, other.options)
    for one, two in zip(results, expected, strict=True):
        np.testing.assert_allclose(as_numpy(one), as_numpy(two), rtol=0, atol=1e-6)
    for key in CACHES:
        if key in call.arrays:
            assert_same_bits(as_numpy(other.arrays[key]), as_numpy(call.arrays[key]))


@every_setting
def test_opcheck(name: str, rng: np.random.Generator) -> None:
    call, _ = make(SETTINGS[name], rng)
    schema = torch.ops.fastattn.attention_with_kvcache.default._schema
    left, right = call.options.get("window", (None, None))
    given: dict[str, Any] = {
        **dict.fromkeys(argument.name for argument in schema.arguments),
        **{"rotary_interleaved": False, "causal": True, "rolling": False, "softcap": 0.0},
        **{key: value for key, value in call.options.items() if key != "window"},
        **call.arrays,
        **{"window_left": left, "window_right": right},
    }
    tensors = [given.pop(argument.name) for argument in schema.arguments[:3]]
    rest = [argument.name for argument in schema.arguments[3:]]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "float8" not in name:  # of which torch compares no two
        checks.append("test_schema")
    results = torch.library.opcheck(
        torch.ops.fastattn.attention_with_kvcache.default,
        (*tensors, *(given.pop(key) for key in rest)),
        test_utils=checks,
    )
    assert set(results.values()) == {"SUCCESS"} and not given


def test_a_fake_call_says_what_shapes_come_out(rng: np.random.Generator) -> None:
    call, _ = make(SETTINGS["paged"], rng)
    with FakeTensorMode() as mode:
        arrays = {name: mode.from_tensor(array) for name, array in call.arrays.items()}
        out, lse = fa.attention_with_kvcache(**arrays, **call.options, return_lse=True)
    assert (out.shape, lse.shape) == ((3, 3, 4, 12), (3, 4, 3))
    with FakeTensorMode() as mode:
        arrays = {name: mode.from_tensor(array) for name, array in call.arrays.items()}
        arrays["new_value"] = arrays["new_value"][..., :-1]
        with pytest.raises(ValueError, match="new_value must have"):
            fa.attention_with_kvcache(**arrays, **call.options)


def test_sinks_that_require_grad_are_refused(rng: np.random.Generator) -> None:
    call, _ = make(SETTINGS["whole"], rng)
    sinks = torch.zeros(call.arrays["query"].shape[2], requires_grad=True)
    with pytest.raises(RuntimeError, match="sinks requires grad, and attention over caches has no gradient"):
        fa.attention_with_kvcache(**call.arrays, **{**call.options, "sinks": sinks})


@pytest.mark.parametrize("backend", [None, "cpu", "math", "reference"])
@pytest.mark.parametrize("target", ["query", "key_cache", "new_value"])
def test_what_requires_grad_is_refused(backend: str | None, target: str, rng: np.random.Generator) -> None:
    call, _ = make(SETTINGS["whole"], rng)
    before = call.arrays["key_cache"].clone()
    call.arrays[target].requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"{target} requires grad, and attention over caches has no gradient"
    ):
        call.run(fa.attention_with_kvcache, backend=backend)
    with torch.no_grad():
        assert_same_bits(as_numpy(call.arrays["key_cache"]), as_numpy(before))
        call.run(fa.attention_with_kvcache, backend=backend)


@pytest.mark.parametrize("backend", [None, "cpu", "math"])
@pytest.mark.parametrize("name", ["whole", "int8", "no-append"])
def test_what_is_written_counts_as_changed(name: str, backend: str | None, rng: np.random.Generator) -> None:
    """A graph that saved a cache notices; one that saved what is only read does not."""
    call, _ = make(SETTINGS[name], rng)
    before = {key: array._version for key, array in call.arrays.items()}
    call.run(fa.attention_with_kvcache, backend=backend)
    for key, array in call.arrays.items():
        changed = key in CACHES and name != "no-append"
        assert (array._version > before[key]) == changed, key


def test_in_inference_mode(rng: np.random.Generator) -> None:
    call, other = twice("rotary", rng)
    expected = call.run(fa.attention_with_kvcache)
    with torch.inference_mode():
        other.arrays = {name: array.clone() for name, array in other.arrays.items()}
        assert_same_bits(as_numpy(other.run(fa.attention_with_kvcache)), as_numpy(expected))


def test_tensors_elsewhere_are_for_math(rng: np.random.Generator) -> None:
    call, _ = make(SETTINGS["whole"], rng)
    call.arrays["value_cache"] = call.arrays["value_cache"].to("meta")
    with pytest.raises(RuntimeError, match="value_cache is on device 'meta', expected 'cpu'"):
        call.run(fa.attention_with_kvcache)


def test_lists_and_tables_of_tensors(rng: np.random.Generator) -> None:
    """Short arguments may be sequences, in a trace too."""
    call, other = twice("whole", rng)
    expected = call.run(fa.attention_with_kvcache, sinks=as_torch(np.arange(4.0)))
    listed = {"cache_seqlens": list(SETTINGS["whole"].lengths), "sinks": [0.0, 1.0, 2.0, 3.0]}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        return fa.attention_with_kvcache(**(arrays | listed), **options)

    torch._dynamo.reset()
    assert_same_bits(as_numpy(step(other.arrays, other.options)), as_numpy(expected))
