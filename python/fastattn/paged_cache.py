"""Keys and values of many sequences in pages of one pool."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastattn.arrays import Array, type_name
from fastattn.page_pool import PagePool
from fastattn.page_table import OutOfPagesError, PageTable, SharedPrefix
from fastattn.problem import Layout, check_layout
from fastattn.vectors import check_integer

__all__ = ["BatchArguments", "CacheUsage", "OutOfPagesError", "PagedKVCache", "SharedPrefix"]


class BatchArguments(TypedDict):
    """Arguments of `attention_with_kvcache` that say where the tokens of a batch are."""

    block_table: Array
    cache_seqlens: Array


class CacheUsage(NamedTuple):
    """What a `PagedKVCache` holds.

    Attributes
    ----------
    sequences, tokens : int
        Live sequences, and their lengths added up.
    pages, used_pages, free_pages : int
        Of the pool, held by sequences, held by none.
    shared_pages : int
        Pages that more than one sequence holds.
    nbytes, used_nbytes : int
        Memory of the pool and of its used pages: keys, values and scales of all layers.
    """

    sequences: int
    tokens: int
    pages: int
    used_pages: int
    free_pages: int
    shared_pages: int
    nbytes: int
    used_nbytes: int


class PagedKVCache:
    r"""A pool of pages for the keys and values of one model, shared by any number of sequences [1]_.

    A page holds the keys and values of `page_size` tokens, of all layers. A sequence is known by a number and
    holds pages; its block table lists them. Forks share pages and copy one only when they are about to write
    to it. Arrays for `attention_with_kvcache` come ready made::

        cache = PagedKVCache(1024, 64, kv_heads=8, head_dim=128, layers=32, dtype=torch.bfloat16)
        sequences = [cache.allocate() for _ in range(batch)]
        step = cache.extend(sequences, query.shape[1])
        for layer in range(32):  # query, key and value are those of the layer
            out = attention_with_kvcache(query, new_key=key, new_value=value, **cache.layer(layer), **step)

    Parameters
    ----------
    num_pages : int
        Pages of the pool. Its memory is allocated at once, and not written to.
    page_size : int
        Tokens a page.
    kv_heads, head_dim : int
        Hkv and D.
    value_dim : int, optional
        Dv; D by default.
    layers : int
        Layers of the model. They share one block table.
    dtype : str, numpy.dtype or torch.dtype
        float64, float32, bfloat16 or float16; or int8, float8_e4m3fn or float8_e5m2: quantised, with a
        float32 scale for each token and head. A torch.dtype makes a pool of tensors, anything else one of
        NumPy arrays (where bfloat16 and the 8-bit floats need ``ml_dtypes``).
    device : torch.device or str, optional
        Where the tensors are; the CPU by default.
    layout : {"bshd", "bhsd"}
        Axes of a layer's pages: (pages, page_size, Hkv, D), or (pages, Hkv, page_size, D), where the rows of
        a head are adjacent, which CPUs read faster.

    Raises
    ------
    TypeError, ValueError
        For sizes that are no integers from 1 up, an unknown dtype, or a `device` without a torch.dtype.

    Notes
    -----
    Any thread may call any method at any time: each is atomic. Threads that extend, write, attend and free
    sequences of their own need no lock, whether or not these share pages: a page that more than one
    sequence holds is never written. What one thread must leave alone while another uses it: the sequence in
    a step between `extend` and its last `write`, which is not to be forked; and the whole cache while pages
    move, in `defragment` and `grow`.

    Arrays that `extend` and `batch` return are snapshots, true until one of their sequences is extended,
    truncated or freed, or pages move. Page numbers depend on the calls so far and on nothing else: the free
    page of the lowest number is taken first.

    On a GPU, memory is copied on the current stream.

    ``copy.deepcopy`` makes a cache of its own, with the same sequences, on the same pages; ``pickle`` saves
    one. Of the pool, both copy what sequences hold. What `layer` returned before belongs to the old one.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
       2023.

    Examples
    --------
    >>> import numpy as np, fastattn as fa
    >>> cache = fa.PagedKVCache(8, 4, kv_heads=2, head_dim=16)
    >>> prompt = cache.allocate()
    >>> step = cache.extend([prompt], 6)
    >>> rows = np.ones((1, 6, 2, 16), np.float32)
    >>> cache.write([prompt], rows, rows)
    >>> answer = cache.fork(prompt)
    >>> cache.extend([answer], 1)["block_table"]  # the first page is shared, the second was copied
    array([[0, 2]], dtype=int32)
    >>> cache.usage().shared_pages
    1
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        layers: int = 1,
        dtype: Any = "float32",
        device: Any = None,
        layout: Layout = "bshd",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"num_pages": num_pages, "page_size": page_size, "kv_heads": kv_heads}
        sizes |= {"head_dim": head_dim, "value_dim": value_dim, "layers": layers}
        for name, size in sizes.items():
            check_integer(name, size, least=1)
        check_layout(layout)
        self.page_size = page_size
        self.layers = layers
        self.layout = layout
        shape = (layers, num_pages, page_size, kv_heads)
        self._pool = PagePool(shape, (head_dim, value_dim), dtype, device, layout)
        self._layers = self._arguments_of_layers()
        self.dtype = self._pool.dtype
        self._table = PageTable(num_pages, page_size)
        self._lock = threading.RLock()
        self._sizes = (page_size, kv_heads, head_dim, value_dim)
        self._options = {"layers": layers, "dtype": dtype, "device": device, "layout": layout}

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            held = self._table.held_pages()
            table = copy.deepcopy(self._table)  # which other threads may change before it is saved
            return {
                "sizes": self._sizes,
                "options": self._options,
                "table": table,
                "pages": held,
                "contents": self._pool.contents(held),
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A new pool: copies of arrays would not have pages first in memory, nor begin where a page does.
        num_pages = len(state["table"].references)
        PagedKVCache.__init__(self, num_pages, *state["sizes"], **state["options"])
        self._table = state["table"]
        self._pool.restore(state["pages"], state["contents"])

    @property
    def sequences(self) -> tuple[int, ...]:
        """The live sequences, from the oldest to the youngest."""
        with self._lock:
            return self._table.sequences

    def length(self, sequence: int) -> int:
        """Return the tokens of a sequence."""
        with self._lock:
            return self._table.length(sequence)

    def allocate(self) -> int:
        """Return the number of a new sequence, without tokens or pages. Numbers are never used twice."""
        with self._lock:
            return self._table.allocate()

    def extend(self, sequences: Sequence[int], num_tokens: int | Sequence[int]) -> BatchArguments:
        """Count new tokens, whose keys and values are to be written next.

        Pages are taken for them, and a page that is shared and would be written to is copied.

        Parameters
        ----------
        sequences : sequence of int
            B different sequences.
        num_tokens : int or sequence of int
            New tokens, of all or of each.

        Returns
        -------
        dict
            ``block_table``, (B, slots) int32, pages up to the new lengths, -1 where a sequence has no more;
            and ``cache_seqlens``, (B,) int32, the lengths before: where the new tokens go.

        Raises
        ------
        OutOfPagesError
            If there are not enough free pages. Nothing has changed then.
        ValueError
            For an unknown or a repeated sequence, or a negative number.
        """
        with self._lock:
            growth = self._growth(sequences, num_tokens)
            before = [self._table.length(sequence) for sequence in growth]
            self._table.make_room(growth, self._pool.copy)
            self._table.append(growth)
            try:
                return self._arguments(list(growth), before)
            except BaseException:  # no memory for these, on whatever device
                self._table.append({sequence: -count for sequence, count in growth.items()})
                raise

    def reserve(self, sequences: Sequence[int], num_tokens: int | Sequence[int]) -> None:
        """Take the pages for so many more tokens, and count none: to `extend` by them cannot fail then.

        A fork shares tokens, and no pages in reserve; it may cost one page more than was reserved.

        Parameters
        ----------
        sequences, num_tokens
            As of `extend`.

        Raises
        ------
        OutOfPagesError, ValueError
            As of `extend`.
        """
        with self._lock:
            self._table.make_room(self._growth(sequences, num_tokens), self._pool.copy)

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Return a new sequence with the first tokens of another, whose pages both share.

        Parameters
        ----------
        sequence : int
        length : int, optional
            How many tokens; all by default.

        Raises
        ------
        ValueError
            For an unknown sequence, or a length beyond its own.
        """
        with self._lock:
            return self._table.fork(sequence, self._checked_length(sequence, length))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens; pages without any are free again, those in reserve too.

        Raises
        ------
        ValueError
            For an unknown sequence, or a length beyond its own.
        """
        with self._lock:
            self._table.truncate(sequence, self._checked_length(sequence, length))

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other one holds are free again.

        Raises
        ------
        ValueError
            For an unknown sequence.
        """
        with self._lock:
            self._table.free(sequence)

    def batch(self, sequences: Sequence[int]) -> BatchArguments:
        """Return the block table and lengths of some sequences, to attend to all of their tokens.

        Returns
        -------
        dict
            ``block_table``, (B, slots) int32, -1 where a sequence has no more pages; and ``cache_seqlens``,
            (B,) int32, the lengths.

        Raises
        ------
        ValueError
            For an unknown sequence.
        """
        _check_several(sequences)
        with self._lock:
            return self._arguments(sequences, [self._table.length(sequence) for sequence in sequences])

    def layer(self, layer: int) -> dict[str, Any]:
        """Return the pages of a layer, as arguments of `attention_with_kvcache`.

        Returns
        -------
        dict
            ``key_cache`` and ``value_cache``, views of the pool; ``layout``; and of a quantised cache
            ``key_scale`` and ``value_scale``, (pages, page_size, Hkv) or (pages, Hkv, page_size) float32.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        if type(layer) is not int or not 0 <= layer < self.layers:
            self._check_layer(layer)
        with self._lock:  # while `grow` moves the pool there are none
            return self._layers[layer].copy()

    def write(
        self,
        sequences: Sequence[int],
        key: Array,
        value: Array,
        *,
        start: int | Sequence[int] | None = None,
        layer: int = 0,
    ) -> None:
        """Store keys and values of tokens counted before: those of a prompt, whose attention needs no cache.

        Parameters
        ----------
        sequences : sequence of int
            B different sequences.
        key, value : array, shape (B, n, Hkv, D) and (B, n, Hkv, Dv), or of layout "bhsd"
            In the cache's dtype; any float dtype if the cache is quantised: each row is then divided by its
            scale, the largest magnitude in it over the largest number of the dtype, and rounded to nearest.
        start : int or sequence of int, optional
            Position of the first of the n tokens, in all or in each. By default they are the last n.
        layer : int

        Raises
        ------
        TypeError, ValueError, RuntimeError
            For arrays that do not fit the cache, tokens beyond a length or on a page that is shared, and
            tensors that require grad. Nothing has been written then.
        """
        _check_different(sequences)
        with self._lock:
            self._check_layer(layer)
            heads_first = self.layout == "bhsd"
            tokens = key.shape[2 if heads_first else 1] if len(getattr(key, "shape", ())) == 4 else 0
            for name, given in (("key", key), ("value", value)):
                self._pool.check(name, given, (len(sequences), tokens), f"{name}_cache")
            pages, rows = self._places(sequences, tokens, start)
            self._pool.write("key", layer, pages, rows, key)
            self._pool.write("value", layer, pages, rows, value)

    def read(self, sequence: int, *, layer: int = 0) -> tuple[Array, Array]:
        """Return copies of the keys and values of a sequence, in one piece.

        Returns
        -------
        key, value : arrays, shape (L, Hkv, D) and (L, Hkv, Dv), or (Hkv, L, ...) of layout "bhsd"
            In the cache's dtype; float32 of a quantised cache.

        Raises
        ------
        ValueError
            For an unknown sequence or layer.
        """
        with self._lock:
            self._check_layer(layer)
            slots, rows = np.divmod(np.arange(self._table.length(sequence)), self.page_size)
            pages = np.asarray(self._table.pages(sequence))[slots]
            return self._pool.read("key", layer, pages, rows), self._pool.read("value", layer, pages, rows)

    def shared_prefixes(self, sequences: Sequence[int]) -> list[SharedPrefix]:
        """Group sequences that start with the same pages, which need be read only once a group.

        Parameters
        ----------
        sequences : sequence of int

        Returns
        -------
        list of SharedPrefix
            Each sequence is a member of one group. Of all ways to group them, this is one that reads the
            fewest pages. Pages that are not full count for none.
        """
        _check_several(sequences)
        with self._lock:
            return self._table.shared_prefixes(sequences)

    def usage(self) -> CacheUsage:
        """Return what there is, and what is held of it."""
        with self._lock:
            table, nbytes = self._table, self._pool.nbytes
            pages = len(table.references)
            used = pages - table.free_pages
            return CacheUsage(
                sequences=len(table.sequences),
                tokens=sum(table.length(sequence) for sequence in table.sequences),
                pages=pages,
                used_pages=used,
                free_pages=table.free_pages,
                shared_pages=int(np.count_nonzero(table.references > 1)),
                nbytes=nbytes,
                used_nbytes=nbytes // pages * used,
            )

    def grow(self, num_pages: int) -> None:
        """Move to a pool of so many pages, which keep their numbers; what `layer` returned is the old one.

        Raises
        ------
        ValueError
            If there are that many already.
        """
        check_integer("num_pages", num_pages, least=0)
        with self._lock:
            if num_pages <= len(self._table.references):
                raise ValueError(f"num_pages must be above {len(self._table.references)}, got {num_pages}")
            self._layers = []  # views, for which the old arrays would be held to the end
            try:
                self._pool.grow(num_pages)
            finally:
                self._layers = self._arguments_of_layers()
            self._table.grow(num_pages)

    def defragment(self) -> None:
        """Move the used pages to the front of the pool, in the order in which sequences hold them."""
        with self._lock:
            order = self._table.held_pages()
            self._pool.reorder(order)
            self._table.renumber(order)

    def __repr__(self) -> str:
        usage = self.usage()
        return (
            f"PagedKVCache({usage.sequences} sequences, {usage.tokens} tokens, {usage.used_pages} of "
            f"{usage.pages} pages of {self.page_size}, {self.dtype})"
        )

    def _growth(self, sequences: Sequence[int], num_tokens: int | Sequence[int]) -> dict[int, int]:
        _check_different(sequences)
        return dict(zip(sequences, _one_each("num_tokens", num_tokens, len(sequences)), strict=True))

    def _arguments(self, sequences: Sequence[int], lengths: list[int]) -> BatchArguments:
        pages = [self._table.pages(s)[: -(-self._table.length(s) // self.page_size)] for s in sequences]
        table = np.full((len(pages), max(map(len, pages), default=0)), -1, np.int32)
        for row, numbers in zip(table, pages, strict=True):
            row[: len(numbers)] = numbers
        integers = self._pool.integers
        return {"block_table": integers(table), "cache_seqlens": integers(np.array(lengths, np.int32))}

    def _places(
        self, sequences: Sequence[int], tokens: int, start: int | Sequence[int] | None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """(pages, rows), each (B, n), of tokens that are to be written."""
        if start is None:
            start = [self._table.length(sequence) - tokens for sequence in sequences]
        else:
            start = _one_each("start", start, len(sequences))
        pages = np.empty((len(sequences), tokens), np.int64)
        rows = np.empty_like(pages)
        for index, (sequence, first) in enumerate(zip(sequences, start, strict=True)):
            length = self._table.length(sequence)
            if first < 0 or first + tokens > length:
                got = f"tokens {first} to {first + tokens}"
                raise ValueError(f"sequence {sequence} has {length} tokens, got {got}: extend it first")
            slots, rows[index] = np.divmod(np.arange(first, first + tokens), self.page_size)
            pages[index] = np.asarray(self._table.pages(sequence))[slots]
        shared = self._table.references[pages] > 1
        if shared.any():
            sequence = sequences[int(np.argmax(shared.any(1)))]
            raise ValueError(
                f"sequence {sequence} shares a page that would be written: fork it after the write"
            )
        return pages, rows

    def _checked_length(self, sequence: int, length: int | None) -> int:
        held = self._table.length(sequence)
        if length is None:
            return held
        check_integer("length", length, least=0)
        if length > held:
            raise ValueError(f"length must be at most the {held} tokens of sequence {sequence}, got {length}")
        return length

    def _arguments_of_layers(self) -> list[dict[str, Any]]:
        return [{**arrays, "layout": self.layout} for arrays in self._pool.layers()]

    def _check_layer(self, layer: int) -> None:
        check_integer("layer", layer, least=0)
        if layer >= self.layers:
            raise ValueError(f"layer must be below {self.layers}, got {layer}")


def _check_several(sequences: Any) -> None:
    """Raise TypeError for one sequence where some are expected."""
    if not hasattr(sequences, "__len__"):
        raise TypeError(f"sequences must be a list of sequences, got {type_name(sequences)}")


def _check_different(sequences: Any) -> None:
    """Raise for one sequence, or one that comes twice."""
    _check_several(sequences)
    if len(set(sequences)) < len(sequences):
        raise ValueError(f"sequences must differ, got {list(sequences)}")


def _one_each(name: str, given: Any, count: int) -> Sequence[int]:
    numbers: Sequence[int] = given if hasattr(given, "__len__") else [given] * count
    if len(numbers) != count:
        raise ValueError(f"{name} must be one number, or {count}, got {len(numbers)}")
    for number in numbers:
        check_integer(name, number, least=0)
    return numbers
