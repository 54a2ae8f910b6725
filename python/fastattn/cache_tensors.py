"""The tensors of a call over caches, seen as memory: whether dtypes, shapes and places in memory agree."""

from __future__ import annotations

from typing import NamedTuple

from fastattn.arrays import FLOATS, Array, ArrayLibrary, Strided
from fastattn.codes import QUANTISED
from fastattn.outputs import overlap, overlaps_itself
from fastattn.problem import Layout


class CacheTensors(NamedTuple):
    """Axes in the order (B or pages, H, L, D) whatever the layout."""

    query: Strided  # (B, Hq, Lq, D)
    key_cache: Strided  # (B or pages, Hkv, rows, D)
    value_cache: Strided
    key_scale: Strided | None  # (B or pages, Hkv, rows)
    value_scale: Strided | None
    new_key: Strided | None  # (B, Hkv, Ln, D)
    new_value: Strided | None

    @classmethod
    def of(cls, library: ArrayLibrary, layout: Layout, paged: bool, *arrays: Array | None) -> CacheTensors:
        """See arrays, in the order of the fields, as memory; raise unless they fit together."""
        appends = arrays[5] is not None or arrays[6] is not None
        views = [
            None if array is None and i > 2 else _view(library, layout, name, array, 0 < i < 5 and appends)
            for i, (name, array) in enumerate(zip(cls._fields, arrays, strict=True))
        ]
        tensors = cls(*views)  # type: ignore[arg-type]
        tensors._check_dtypes()
        tensors._check_caches(paged)
        tensors._check_scales()
        if appends:
            tensors._check_new_rows()
        return tensors

    @property
    def added(self) -> int:
        """Ln."""
        return 0 if self.new_key is None else self.new_key.shape[2]

    def _check_dtypes(self) -> None:
        query, key, value = self.query.dtype, self.key_cache.dtype, self.value_cache.dtype
        if query not in FLOATS:
            raise TypeError(f"query must be one of {', '.join(FLOATS)}, got {query}")
        if key != value or key not in (query, *QUANTISED):
            expected = f"one dtype, query's {query} or one of {', '.join(QUANTISED)}"
            raise TypeError(f"key_cache and value_cache must have {expected}, got {key} and {value}")

    def _check_caches(self, paged: bool) -> None:
        query, key, value = self.query.shape, self.key_cache.shape, self.value_cache.shape
        if key[:3] != value[:3]:
            got = f"{key[:3]} and {value[:3]} as (batch or pages, heads, length)"
            raise ValueError(f"key_cache and value_cache must have the same shape but for the dim, got {got}")
        if not paged and key[0] != query[0]:
            got = f"{query[0]} and {key[0]} (pages need a block_table)"
            raise ValueError(f"query and key_cache must have one batch size, got {got}")
        if paged and not key[2]:
            raise ValueError("key_cache must have pages of at least one row, got none")
        if query[3] != key[3]:
            raise ValueError(f"query and key_cache must have one head dimension, got {query[3]} and {key[3]}")
        if not query[3] or not value[3]:
            got = f"{query[3]} for query and {value[3]} for value_cache"
            raise ValueError(f"head dimensions must be at least 1, got {got}")
        if not query[1] or not key[1] or query[1] % key[1]:
            got = f"{query[1]} and {key[1]}"
            raise ValueError(
                f"query's heads must be a positive multiple of key_cache's heads, got {got} (see layout)"
            )

    def _check_scales(self) -> None:
        dtype, shape = self.key_cache.dtype, self.key_cache.shape[:3]
        for name, scale in ("key_scale", self.key_scale), ("value_scale", self.value_scale):
            if dtype not in QUANTISED:
                if scale is not None:
                    raise ValueError(f"{name} must be None with caches of {dtype}, got an array")
            elif scale is None:
                raise ValueError(f"{name} must be given with caches of {dtype}, got None")
            elif scale.dtype != "float32":
                raise TypeError(f"{name} must be float32, got {scale.dtype}")
            elif scale.shape != shape:
                expected = f"a number for each row of its cache, (batch or pages, heads, length) {shape}"
                raise ValueError(f"{name} must have {expected}, got {scale.shape}")

    def _check_new_rows(self) -> None:
        key, value = self.new_key, self.new_value
        if key is None or value is None:
            missing = "new_key" if key is None else "new_value"
            raise ValueError(f"new_key and new_value must be given together, got None for {missing}")
        named = ("new_key", key, self.key_cache), ("new_value", value, self.value_cache)
        for name, rows, cache in named:
            if rows.dtype != self.query.dtype:
                raise TypeError(f"{name} must have query's dtype {self.query.dtype}, got {rows.dtype}")
            expected = (self.query.shape[0], cache.shape[1], key.shape[2], cache.shape[3])
            if rows.shape != expected:
                raise ValueError(f"{name} must have (batch, heads, length, dim) {expected}, got {rows.shape}")

    def check_overlaps(self) -> None:
        """Raise ValueError where what is written shares memory with itself or with what is read."""
        if self.new_key is None:
            return
        read = {name: getattr(self, name) for name in ("query", "new_key", "new_value")}
        for name in self._fields[1:5]:
            written: Strided | None = getattr(self, name)
            if written is None:
                continue
            if overlaps_itself(written):
                got = f"strides {written.strides} for shape {written.shape}"
                raise ValueError(f"{name} must not overlap itself, got {got}")
            for other, view in read.items():
                if overlap(written, view):
                    raise ValueError(f"{name} must not overlap {other}: they share memory")
            read[name] = written


def _view(library: ArrayLibrary, layout: Layout, name: str, array: Array, to_write: bool) -> Strided:
    view = library.view(name, array, to_write=to_write)
    rank = 3 if name.endswith("scale") else 4
    if len(view.shape) != rank:
        axes = (
            ("batch", "heads", "length", "dim") if layout == "bhsd" else ("batch", "length", "heads", "dim")
        )
        expected = f"{rank} axes ({', '.join(axes[:rank])})"
        raise ValueError(
            f"{name} must have {expected}, a cache in pages these for the batch, got {view.shape}"
        )
    if layout == "bhsd":
        return view
    (a, m, n, *dim), (step_a, step_m, step_n, *step_dim) = view.shape, view.strides
    return view._replace(shape=(a, n, m, *dim), strides=(step_a, step_n, step_m, *step_dim))
