"""The functions around the computation: what comes back, where it is written, what is explained."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
import shapes
from fastattn import ops

CASE = shapes.Case("functional", 5, 7, 8, 6, batch=2, query_heads=4, kv_heads=2)


def attention(*tensors: Any, **options: Any) -> Any:
    return fa.attention(*tensors, **{"backend": "reference", **options})


@pytest.mark.parametrize("library", shapes.LIBRARIES)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_what_comes_back(dtype: str, library: str) -> None:
    tensors = CASE.tensors(dtype, library)
    out = attention(*tensors)
    assert type(out) is type(tensors[0])
    assert out.dtype == tensors[0].dtype and out.shape == (2, 4, 5, 6)
    pair = attention(*tensors, return_lse=True)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert str(pair[1].dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
    assert pair[1].shape == (2, 4, 5)
    _, weights = attention(*tensors, return_weights=True)
    assert weights.dtype == out.dtype and weights.shape == (2, 4, 5, 7)
    assert [part.ndim for part in attention(*tensors, return_lse=True, return_weights=True)] == [4, 3, 4]


@pytest.mark.parametrize("library", shapes.LIBRARIES)
def test_layout(library: str) -> None:
    tensors = CASE.tensors(library=library)
    expected = attention(*tensors, return_lse=True, return_weights=True)
    swapped = [tensor.swapaxes(1, 2) for tensor in tensors]
    out, lse, weights = attention(*swapped, layout="bshd", return_lse=True, return_weights=True)
    assert out.shape == (2, 5, 4, 6)
    for got, want in zip((out.swapaxes(1, 2), lse, weights), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("library", shapes.LIBRARIES)
def test_out_is_written_and_returned(library: str, layout: str) -> None:
    tensors = CASE.tensors(library=library)
    expected = attention(*tensors)
    buffer = shapes.convert(np.full((2, 9, 5, 11), 7.0), "float32", library)
    out = buffer[:, 1:5, :, 2:8]  # strided, at an offset
    if layout == "bshd":
        tensors, out = tuple(tensor.swapaxes(1, 2) for tensor in tensors), out.swapaxes(1, 2)
    returned, _ = attention(*tensors, layout=layout, out=out, return_lse=True)
    assert returned is out
    np.testing.assert_array_equal(buffer[:, 1:5, :, 2:8], expected)
    assert (buffer[:, 0] == 7).all() and (buffer[..., 8:] == 7).all()


def test_out_that_a_graph_has_saved() -> None:
    """torch must notice that the values are gone, as after any operation in place."""
    tensors = CASE.tensors(library="torch")
    saved, leaf = torch.ones(2, 4, 5, 6), torch.ones(2, 4, 5, 6, requires_grad=True)
    product = (saved * leaf).sum()
    attention(*tensors, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        assert attention(*tensors, out=torch.ones(2, 4, 5, 6)).is_inference()


@pytest.mark.parametrize("library", shapes.LIBRARIES)
def test_lists_of_no_ids(library: str) -> None:
    query, key = (shapes.convert(np.ones((1, 1, rows, 8)), "float32", library) for rows in (0, 3))
    ids = [[]], [[0, 0, 1]]
    assert attention(query, key, key, segment_ids=ids).shape == (1, 1, 0, 8)
    if library == "torch":  # an operator takes them as tensors
        assert ops.forward(query, key, key, segment_ids=ids)[0].shape == (1, 1, 0, 8)


def test_out_of_an_empty_call() -> None:
    empty = np.zeros((0, 2, 3, 4), np.float32)
    out = np.zeros_like(empty)
    assert attention(empty, empty, empty, out=out) is out


def test_backend_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    tensors = CASE.tensors()
    environment.setenv("FASTATTN_BACKEND", "reference")
    assert fa.explain(*tensors).backend == "reference"
    np.testing.assert_array_equal(fa.attention(*tensors), attention(*tensors))


def test_explain_computes_nothing_and_prints_well() -> None:
    tensors = CASE.tensors("float16", "torch")
    explanation = fa.explain(*tensors, causal=True, backend="reference", return_lse=True)
    assert explanation.backend == "reference"
    assert str(explanation).splitlines() == [
        "call     float16 B=2 Hq=4 Hkv=2 Lq=5 Lk=7 D=8 Dv=6",
        "backend  reference",
        "path     NumPy in float64, one head at a time",
        "not      cpu: not asked for",
        "not      triton: not asked for",
        "not      math: runs only as backend='math'",
    ]


def test_explain_says_when_nothing_would_run() -> None:
    wide = np.zeros((1, 1, 1, 1000), np.float32)
    explanation = fa.explain(wide, wide, wide)
    assert explanation.backend is None
    assert "backend  none can run it" in str(explanation)
    assert "head dimension 1000 is more than 576" in explanation.refusals["cpu"]
    assert explanation.refusals["reference"] == ["runs only as backend='reference'"]


def test_explain_takes_the_arguments_of_attention() -> None:
    tensors = CASE.tensors()
    with pytest.raises(TypeError, match="dropout"):
        fa.explain(*tensors, dropout=0.1)
    with pytest.raises(ValueError, match="window"):
        fa.explain(*tensors, window=(-1, 0))


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fa.show_config()
    printed = capsys.readouterr().out
    assert fa.__version__ in printed
    assert torch.__version__ in printed
    assert f"{fa.get_num_threads()} (from " in printed
    to_file = io.StringIO()
    fa.show_config(to_file)
    assert to_file.getvalue() == printed
    assert not capsys.readouterr().out


def test_one_version() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == fa.__version__


def test_everything_public_has_a_name_and_words() -> None:
    for name in fa.__all__:
        assert getattr(fa, name).__doc__, name
