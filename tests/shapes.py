"""The one list of shapes, for the tests and the benchmarks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

DTYPES = ("float64", "float32", "bfloat16", "float16")
LIBRARIES = ("numpy", "torch")
# Arguments that are arrays; a Case names those it wants and draws them itself.
ARRAYS = ("mask", "padding", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks")
# What does not exist, and packed documents: ids side by side ("segments") or in any order.
PADDED = ("kv_starts", "query_lengths", "segments", "mixed_segments")
# Dense ones only benchmarks ask for: a mask with 1% holes, the causal rule as a mask, one bias for all heads.
DENSE = {"holes": "mask", "triangle": "mask", "shared_bias": "bias"}


@dataclass(frozen=True)
class Case:
    """One call: sizes, and the options that go with them."""

    name: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int = 64
    value_dim: int = 0  # 0: head_dim
    batch: int = 1
    query_heads: int = 1
    kv_heads: int = 0  # 0: query_heads
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    arrays: tuple[str, ...] = ()  # of ARRAYS, PADDED and DENSE

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.query_heads)
        assert set(self.arrays) <= {*ARRAYS, *PADDED, *DENSE}, self.arrays

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.query_heads, self.seqlen_q, self.seqlen_k

    def tensors(
        self, dtype: str = "float32", library: str = "numpy", *, seed: int = 0, spread: float = 1.0
    ) -> tuple[Any, Any, Any]:
        """Query, key and value, normally distributed; `spread` scales query and so the scores."""
        rng = self._rng("tensors", seed)
        kv_shape = (self.batch, self.kv_heads, self.seqlen_k)
        query = rng.standard_normal((*self.scores_shape[:3], self.head_dim)) * spread
        key = rng.standard_normal((*kv_shape, self.head_dim))
        value = rng.standard_normal((*kv_shape, self.value_dim))
        return convert(query, dtype, library), convert(key, dtype, library), convert(value, dtype, library)

    def grad_out(self, dtype: str = "float32", library: str = "numpy", *, seed: int = 0) -> Any:
        """What a backward starts from, normally distributed."""
        shape = (*self.scores_shape[:3], self.value_dim)
        return convert(self._rng("grad_out", seed).standard_normal(shape), dtype, library)

    def options(self, dtype: str = "float32", library: str = "numpy", *, seed: int = 0) -> dict[str, Any]:
        """The other arguments of `fastattn.attention`."""
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        for name in self.arrays:
            if name.endswith("segments"):
                ids = self._draw_segments(name, self._rng(name, seed))
                options["segment_ids"] = tuple(convert(of, "int64", library) for of in ids)
                continue
            values, own_dtype = self._draw(name, self._rng(name, seed))
            argument = "mask" if name == "padding" else DENSE.get(name, name)
            options[argument] = convert(values, own_dtype or dtype, library)
        return options

    def _draw(self, name: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """An array argument and its dtype, "" being query's."""
        batch, heads, seqlen_q, seqlen_k = self.scores_shape
        if name == "mask":
            mask = rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.7
            mask[:, :, seqlen_q // 2] = False  # a row that may attend to nothing
            return mask, "bool"
        if name == "holes":
            return rng.random((1, 1, seqlen_q, seqlen_k)) < 0.99, "bool"
        if name == "triangle":
            return np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)[None, None], "bool"
        if name == "shared_bias":
            return rng.standard_normal((1, 1, seqlen_q, seqlen_k)), ""
        if name == "padding":
            return np.arange(seqlen_k) < rng.integers(1, seqlen_k + 1, (batch, 1, 1, 1)), "bool"
        if name == "bias":
            bias = rng.standard_normal((heads, seqlen_q, seqlen_k))
            bias[rng.random(bias.shape) < 0.1] = -np.inf
            return bias, ""
        if name == "kv_lengths":
            return rng.integers(0, seqlen_k + 1, batch), "int64"
        if name == "kv_starts":
            return rng.integers(0, seqlen_k // 2 + 1, batch), "int64"
        if name == "query_lengths":
            return rng.integers(0, seqlen_q + 1, batch), "int64"
        if name == "query_offset":
            return rng.integers(-seqlen_q, seqlen_k + 1, batch), "int64"
        if name == "alibi_slopes":
            return 2.0 ** (-8 * np.arange(1, heads + 1) / heads), "float32"
        return rng.standard_normal(heads), "float32"  # sinks

    def _draw_segments(self, name: str, rng: np.random.Generator) -> list[np.ndarray]:
        """Of queries and of keys: five, of which a query may find none among the keys."""
        ids = [rng.integers(-2, 3, (self.batch, length)) for length in self.scores_shape[2:]]
        return ids if name == "mixed_segments" else [np.sort(of, 1) for of in ids]

    def _rng(self, what: str, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(f"{self.name} {what}".encode())])

    def __str__(self) -> str:
        return self.name


def convert(values: np.ndarray, dtype: str, library: str = "numpy") -> Any:
    """`values` rounded to `dtype`, as an array of `library`."""
    if library == "torch":
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)


TINY = (
    Case("tiny-1x1", 1, 1, 1),
    Case("tiny-2x3", 2, 3, 4, batch=2, query_heads=2),
    Case("tiny-5x5-causal", 5, 5, 8, causal=True),
)
EMPTY = (
    Case("empty-batch", 4, 4, 8, batch=0),
    Case("empty-queries", 0, 4, 8),
    Case("empty-keys", 4, 0, 8),
    Case("empty-keys-sinks", 4, 0, 8, query_heads=2, arrays=("sinks",)),
    Case("empty-both-causal", 0, 0, 8, causal=True),
)
# Around the widths of registers, register tiles and blocks.
TAILS = tuple(
    Case(f"tail-{length}{'-causal' if causal else ''}", length, length, 16, causal=causal)
    for length in (1, 7, 8, 9, 17, 31, 33, 63, 65, 257)
    for causal in (False, True)
)
GROUPS = (
    *(Case(f"group-{g}", 33, 40, 16, query_heads=2 * g, kv_heads=2, causal=True) for g in range(1, 9)),
    Case("mqa-16", 17, 50, 32, batch=2, query_heads=16, kv_heads=1),
    Case("mqa-16-decode", 1, 50, 32, batch=2, query_heads=16, kv_heads=1),
)
HEAD_DIMS = tuple(
    Case(f"dim-{dim}", 40, 70, dim, min(dim, 512))
    for dim in (1, 3, 8, 16, 32, 33, 40, 64, 80, 96, 128, 192, 256, 576)
)
VALUE_DIMS = tuple(
    Case(f"dim-{dim}-{value_dim}", 40, 70, dim, value_dim, query_heads=2, kv_heads=1, causal=True)
    for dim, value_dim in ((64, 1), (64, 33), (64, 128), (128, 64), (192, 128), (32, 512), (576, 512))
)
LENGTHS = (
    Case("more-keys", 20, 130, causal=True),
    Case("more-keys-top-left", 20, 130, causal="top_left"),
    Case("more-queries", 130, 20, causal=True),  # its first rows may attend to nothing
    Case("more-queries-top-left", 130, 20, causal="top_left"),
    Case("cross", 48, 700, query_heads=2),
)
LONG = (
    Case("long-1000", 1000, 1000),
    Case("long-1000-causal", 1000, 1000, causal=True),
    Case("long-1024", 1024, 1024, 128),
    Case("long-1024-causal", 1024, 1024, 128, causal=True),
)
# What docs/accuracy.md states of gradients.
GRADIENTS = tuple(
    Case(f"gradients-{dim}{'-causal' if causal else ''}", 1024, 1024, dim, causal=causal)
    for dim in (64, 128)
    for causal in (False, True)
)
# For large numbers: with nearly all weight on one key, dP - rowsum(dO O) is a difference of near equals.
SATURATED = tuple(
    Case(f"saturated-{dim}{'-causal' if causal else ''}", 128, 128, dim, query_heads=4, causal=causal)
    for dim in (8, 16, 32, 64)
    for causal in (False, True)
)
DECODE = (
    Case("decode-short", 1, 65, 64, query_heads=4),
    Case("decode-long", 1, 3000, 128, query_heads=4, kv_heads=2, causal=True),
    Case("decode-group-7", 1, 1500, 128, query_heads=14, kv_heads=2, causal=True),
    Case("decode-batch", 1, 777, 64, batch=3, query_heads=8, kv_heads=2, arrays=("kv_lengths",)),
    *(
        Case(f"queries-{length}", length, 600, 64, query_heads=4, kv_heads=2, causal=True)
        for length in (2, 3, 5, 8, 13, 16, 31, 32, 63)
    ),
)
OPTIONS = (
    *(
        Case(f"only-{name}", 45, 77, 32, batch=2, query_heads=4, kv_heads=2, arrays=(name,))
        for name in ARRAYS
    ),
    Case("only-softcap", 45, 77, 32, batch=2, query_heads=4, kv_heads=2, softcap=2.0),
    Case("window", 200, 200, 32, window=(17, 5)),
    Case("window-left", 200, 300, 32, causal=True, window=(40, None)),
    Case("window-right", 300, 200, 32, window=(None, 9)),
    Case("window-0", 70, 70, 32, window=(0, 0)),
    Case("causal-mask", 130, 130, 32, causal=True, batch=2, query_heads=2, arrays=("mask",)),
    Case("causal-bias-sinks", 65, 130, 32, causal=True, query_heads=4, kv_heads=1, arrays=("bias", "sinks")),
    Case("alibi-causal-lengths", 65, 200, 64, causal=True, batch=3, arrays=("alibi_slopes", "kv_lengths")),
    Case(
        "softcap-bias-offset", 33, 90, 40, causal=True, batch=2, softcap=5.0, arrays=("bias", "query_offset")
    ),
    Case(
        "everything",
        70,
        150,
        48,
        80,
        batch=3,
        query_heads=6,
        kv_heads=2,
        causal=True,
        window=(60, 0),
        softcap=3.0,
        arrays=("mask", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks"),
    ),
)
PADDING = (
    *(
        Case(f"only-{name}", 45, 77, 32, batch=2, query_heads=4, kv_heads=2, arrays=(name,))
        for name in PADDED
    ),
    Case("few-padded", 3, 400, 32, batch=3, query_heads=4, kv_heads=2, causal=True, arrays=PADDED[:3]),
    Case("few-mixed", 3, 70, 32, batch=2, query_heads=4, kv_heads=2, arrays=PADDED[1:]),
    Case("packed-causal", 300, 300, 32, query_heads=2, causal=True, arrays=("segments",)),
    Case(
        "packed-alibi", 140, 300, 32, batch=2, window=(90, 20), arrays=("segments", "alibi_slopes", "sinks")
    ),
    Case(
        "padded-everything",
        70,
        150,
        48,
        80,
        batch=3,
        query_heads=6,
        kv_heads=2,
        causal=True,
        window=(90, 0),
        softcap=3.0,
        arrays=(*(name for name in ARRAYS if name != "padding"), *PADDED[:2], "mixed_segments"),
    ),
)
SMALL = (*TINY, *EMPTY, *TAILS, *GROUPS, *HEAD_DIMS, *VALUE_DIMS, *LENGTHS, *OPTIONS, *PADDING)
CASES = (*SMALL, *DECODE, *LONG)

# What the benchmarks time, and the tests do not iterate over. Eight heads, as in the tables of record;
# two where eight would take seconds a call.


def _prefill(length: int, head_dim: int, query_heads: int = 8, **options: Any) -> tuple[Case, Case]:
    """Without and with the causal rule."""
    name = f"prefill-d{head_dim}-s{length}"
    full = Case(name, length, length, head_dim, query_heads=query_heads, **options)
    return full, replace(full, name=f"{name}-causal", causal=True)


def _decode(
    name: str, length: int, query_heads: int, kv_heads: int, queries: int = 1, batch: int = 1
) -> Case:
    return Case(name, queries, length, 128, 0, batch, query_heads, kv_heads, causal=True)


PREFILL = tuple(case for length in (512, 2048) for dim in (64, 128) for case in _prefill(length, dim))
PREFILL_LONG = tuple(case for dim in (64, 128) for case in _prefill(8192, dim, query_heads=2))
GROUPED = Case("prefill-gqa-32x8", 1024, 1024, 128, query_heads=32, kv_heads=8, causal=True)
PREFILL_ODD = (
    *(_prefill(2048, dim)[0] for dim in (32, 80, 96, 256)),
    *(_prefill(1000, dim)[0] for dim in (64, 128)),
    GROUPED,
)
ONE_HEAD = _prefill(4096, 64, query_heads=1)  # a backward has to divide its keys among threads
TWO_HEAD_SIZES = Case("prefill-d64-dv128", 1024, 1024, 64, 128, batch=2, query_heads=8)

# Variations of a plain call, each held against the plain call that it varies.
_FULL, _CAUSAL = _prefill(2048, 64)
VARIATIONS = (
    (_FULL, replace(_FULL, name="bool-mask", arrays=("holes",))),
    (_FULL, replace(_FULL, name="float-bias", arrays=("shared_bias",))),
    (_FULL, replace(_FULL, name="softcap", softcap=20.0)),
    (_CAUSAL, replace(_FULL, name="causal-as-mask", arrays=("triangle",))),
    (_CAUSAL, replace(_CAUSAL, name="alibi", arrays=("alibi_slopes",))),
    (_CAUSAL, replace(_CAUSAL, name="sinks", arrays=("sinks",))),
)
WINDOW = Case("window-256-s8192", 8192, 8192, 64, query_heads=8, causal=True, window=(255, 0))

FEW_QUERIES = tuple(
    _decode(f"queries-{length}-s8192", 8192, 32, 8, length) for length in (2, 4, 8, 16, 32, 63)
)
DECODE_ROWS = (
    _decode("decode-32x32-s8192", 8192, 32, 32),
    _decode("decode-32x8-s8192", 8192, 32, 8),
    _decode("decode-28x4-s8192", 8192, 28, 4),
    _decode("decode-8-sequences-32x8-s2048", 2048, 32, 8, batch=8),
)
MICRO = tuple(
    Case(f"micro-{b}x{h}x{s}x{d}", s, s, d, batch=b, query_heads=h)
    for b, h, s, d in (
        (1, 1, 1, 64),
        (1, 32, 1, 128),
        (1, 12, 16, 32),
        (1, 12, 64, 32),
        (4, 12, 64, 32),
        (1, 8, 128, 64),
    )
)
