"""Calls over caches for the tests, and what they should give: each sequence on its own, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import bounds
import fastattn as fa
from shapes import convert

HQ, HKV, D, DV = 4, 2, 16, 12
LENGTHS = (0, 5, 37)  # before the call
ROOM = 48
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
ROTARY = {"halves": False, "interleaved": True}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (9, 0)},
    "window both ways": {"window": (6, 1), "causal": False},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": np.array([0.5, -np.inf, 2.0, -1.0])},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625])},
    "all": {
        "window": (20, 0),
        "softcap": 3.0,
        "sinks": np.array([0.5, 0.0, 2.0, -1.0]),
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625]),
        "scale": 0.4,
    },
}


@dataclass(frozen=True)
class Setting:
    """What a call over caches is made of."""

    dtype: str = "float32"
    cache_dtype: str = ""  # "": dtype
    page_size: int = 0  # 0: in one piece
    added: int = 3
    seqlen_q: int = 3
    rotary: str = ""
    rolling: bool = False
    lengths: tuple[int, ...] = LENGTHS
    layout: str = "bshd"
    library: str = "numpy"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        pages = f"pages{self.page_size}" if self.page_size else "whole"
        parts = (self.cache_dtype or self.dtype, pages, f"{self.added}of{self.seqlen_q}", self.rotary)
        return "-".join(str(part) for part in parts if part)

    @property
    def quantised(self) -> bool:
        return self.cache_dtype in LARGEST


@dataclass
class Call:
    """Arrays to call with, and what is in the caches, row by row, before it."""

    setting: Setting
    arrays: dict[str, Any]  # in the setting's layout and library
    options: dict[str, Any]
    rows: list[tuple[np.ndarray, np.ndarray]]  # of each sequence: keys (n, Hkv, D), values, as read, float64
    query: np.ndarray  # (B, Lq, Hq, D)
    tables: tuple[np.ndarray, np.ndarray]  # cosines and sines

    def run(self, function: Any, **changes: Any) -> Any:
        return function(**self.arrays, **(self.options | changes))


def table_of(setting: Setting, rng: np.random.Generator) -> tuple[int, np.ndarray | None]:
    """How many pages there are, and which page is where; what no length reaches is garbage."""
    if not setting.page_size:
        return len(setting.lengths), None
    slots = -(-ROOM // setting.page_size)
    pages = len(setting.lengths) * slots + 2
    table = rng.permutation(pages)[: len(setting.lengths) * slots].reshape(-1, slots)
    for b, length in enumerate(setting.lengths):
        used = slots if setting.rolling else -(-(length + setting.added) // setting.page_size)
        table[b, used:] = (-1, 10**9, pages, -(2**31))[b % 4]
    return pages, table.astype(np.int32)


def quantise(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 rows (..., D)."""
    largest = np.abs(rows).max(-1)
    with np.errstate(invalid="ignore"):
        scale = largest / np.float32(LARGEST[dtype])
        codes = np.where(scale[..., None] > 0, rows / np.where(scale > 0, scale, 1)[..., None], 0)
    codes = np.rint(codes).astype(np.int8) if dtype == "int8" else codes.astype(getattr(ml_dtypes, dtype))
    return codes, scale.astype(np.float32)


def turn(rows: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rows (L, H, D), turned by tables (L, pairs), in the rows' own precision."""
    turned, pairs = rows.copy(), cos.shape[1]
    cos, sin = cos[:, None].astype(rows.dtype), sin[:, None].astype(rows.dtype)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        turned[..., a] = rows[..., a] * cos[..., i] - rows[..., b] * sin[..., i]
        turned[..., b] = rows[..., b] * cos[..., i] + rows[..., a] * sin[..., i]
    return turned


def wide(array: Any) -> np.ndarray:
    """In the precision that rows are turned and quantised in."""
    return array if array.dtype == np.float64 else array.astype(np.float32)


def make(setting: Setting, rng: np.random.Generator) -> tuple[Call, Any]:
    """A call, and the caches that it should leave behind, in NumPy and "bshd"; of NaN what holds no row."""
    s, batch = setting, len(setting.lengths)
    pages, table = table_of(s, rng)
    size = s.page_size or ROOM
    dtype = s.cache_dtype or s.dtype

    def draw(*shape: int) -> np.ndarray:
        return convert(rng.standard_normal(shape), s.dtype)

    query = draw(batch, s.seqlen_q, HQ, D)
    new = draw(batch, s.added, HKV, D), draw(batch, s.added, HKV, DV)
    cos, sin = (f(rng.uniform(0, 6, (200, 5))).astype(np.float32) for f in (np.cos, np.sin))
    caches: dict[str, np.ndarray] = {}
    for name, dim in ("key", D), ("value", DV):
        blank = np.full((pages, size, HKV, dim), 0x7F, np.int8)  # a NaN in either float8
        if s.cache_dtype == "":
            blank = convert(np.full(blank.shape, np.nan), s.dtype)
        elif dtype != "int8":
            blank = blank.view(getattr(ml_dtypes, dtype))
        caches[f"{name}_cache"] = blank
        if s.quantised:
            caches[f"{name}_scale"] = np.full((pages, size, HKV), np.nan, np.float32)

    def put(store: dict[str, np.ndarray], name: str, b: int, position: int, row: np.ndarray) -> None:
        at = position % (ROOM if table is None else table.shape[1] * size)
        outer, inner = (b, at) if table is None else (int(table[b, at // size]), at % size)
        if not s.quantised:
            store[f"{name}_cache"][outer, inner] = row.astype(store[f"{name}_cache"].dtype)
            return
        codes, scale = quantise(row.astype(np.float32), dtype)
        store[f"{name}_cache"][outer, inner], store[f"{name}_scale"][outer, inner] = codes, scale

    for b, length in enumerate(s.lengths):
        for position in range(length):
            put(caches, "key", b, position, wide(draw(HKV, D)))
            put(caches, "value", b, position, wide(draw(HKV, DV)))
    after = {name: array.copy() for name, array in caches.items()}
    for b, length in enumerate(s.lengths):
        keys = wide(new[0][b])
        if s.rotary:
            at = slice(length, length + s.added)
            keys = turn(keys, cos[at], sin[at], ROTARY[s.rotary])
        for i in range(s.added):
            put(after, "key", b, length + i, keys[i])
            put(after, "value", b, length + i, wide(new[1][b, i]))

    rows = []
    for b, length in enumerate(s.lengths):
        both = []
        for name in ("key", "value"):
            capacity = ROOM if table is None else table.shape[1] * size
            whole = after[f"{name}_cache"][b] if table is None else after[f"{name}_cache"][table[b] % pages]
            whole = whole.reshape(capacity, HKV, -1).astype(np.float64)
            if s.quantised:
                scale = (
                    after[f"{name}_scale"][b] if table is None else after[f"{name}_scale"][table[b] % pages]
                )
                whole = whole * scale.reshape(capacity, HKV, 1).astype(np.float64)
            both.append(whole[np.arange(length + s.added) % capacity])
        rows.append((both[0], both[1]))

    arrays: dict[str, Any] = {"query": query, **caches}
    if s.added:
        arrays |= {"new_key": new[0], "new_value": new[1]}
    if s.layout == "bhsd":
        arrays = {name: np.ascontiguousarray(np.swapaxes(array, 1, 2)) for name, array in arrays.items()}
    if s.rotary:
        arrays |= {"rotary_cos": cos, "rotary_sin": sin}
    if table is not None:
        arrays["block_table"] = table
    arrays["cache_seqlens"] = np.array(s.lengths)
    options = {"layout": s.layout, "rolling": s.rolling, **s.options}
    if s.library == "torch":
        arrays = {name: as_torch(array) for name, array in arrays.items()}
        options = {name: as_torch(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    if s.rotary:
        options["rotary_interleaved"] = ROTARY[s.rotary]
    return Call(s, arrays, options, rows, query, (cos, sin)), after


def expected(call: Call) -> list[bounds.Expected]:
    """What each sequence gives: attention over its own rows, axes (1, Hq, Lq, ...)."""
    s, results = call.setting, []
    options = {"causal": True} | s.options
    for b, (keys, values) in enumerate(call.rows):
        q = wide(call.query[b])
        if s.rotary:
            cos, sin = call.tables
            first = s.lengths[b] + s.added - s.seqlen_q
            moves = options["causal"] or "window" in options
            at = first + np.arange(s.seqlen_q) * moves
            q = convert(turn(q, cos[at], sin[at], ROTARY[s.rotary]), s.dtype)
        q = q.astype(np.float64)[None]
        results.append(bounds.expect(q, keys[None], values[None], layout="bshd", **options))
    return results


def cost(cache_dtype: str, dim: int, outliers: float, rows: int = 1024) -> tuple[float, float]:
    """What a cache of that dtype costs: the error of out (relative, root mean square), the largest of lse."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, rows, 4, dim), np.float32) for _ in range(3))
    query, key[..., 3] = query[:, -16:], key[..., 3] * outliers
    exact = bounds.expect(query, key, value, causal=True, layout="bshd")
    if cache_dtype in LARGEST:
        kind = np.dtype(getattr(ml_dtypes, cache_dtype, cache_dtype))
        held = {f"{name}_cache": np.empty(key.shape, kind) for name in ("key", "value")}
        held |= {f"{name}_scale": np.empty(key.shape[:3], np.float32) for name in ("key", "value")}
        options = {"new_key": key, "new_value": value, "cache_seqlens": 0}
    else:
        rounded = (convert(array, cache_dtype).astype(np.float32) for array in (key, value))
        held, options = dict(zip(("key_cache", "value_cache"), rounded, strict=True)), {}
    out, lse = fa.attention_with_kvcache(query, **held, **options, return_lse=True)
    error = out.swapaxes(1, 2) - exact.out
    return float(np.sqrt((error**2).mean() / (exact.out**2).mean())), float(abs(lse - exact.lse).max())


def as_torch(array: np.ndarray) -> Any:
    """The same bits as a tensor."""
    import torch

    name = array.dtype.name
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        bits = array.view(np.int16 if name == "bfloat16" else np.uint8)
        return torch.from_numpy(bits.copy()).view(getattr(torch, name))
    return torch.from_numpy(array.copy())


def as_numpy(array: Any) -> np.ndarray:
    """Floats as float64, codes as their bits."""
    if not isinstance(array, np.ndarray):
        import torch

        if array.element_size() == 1:
            return array.view(torch.uint8).numpy()
        return array.double().numpy() if array.is_floating_point() else array.numpy()
    if array.dtype.itemsize == 1:
        return array.view(np.uint8)
    return array.astype(np.float64)
