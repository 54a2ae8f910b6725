"""A cache of keys and values for ``transformers`` models, in pages that attention reads where they lie.

>>> from fastattn.integrations.transformers import PagedCache
>>> output = model.generate(**inputs, max_new_tokens=20, cache=PagedCache(model.config))
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin

from fastattn.integrations.torch_sdpa import as_autocast_would
from fastattn.kvcache import attention_with_kvcache
from fastattn.paged_cache import CacheUsage, OutOfPagesError, PagedKVCache
from fastattn.vectors import check_integer

__all__ = ["PagedCache", "PagedStates"]

_PAGE_SIZES = (128, 1024)  # the smallest and the largest that is chosen for a prompt
_KEPT_TYPES = ("full_attention", "sliding_attention", "chunked_attention")  # layers that have keys and values
# What `crop` is told: in transformers 5 how many tokens to remove, as a negative number; before, how many
# to keep.
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(Cache.crop).parameters


class PagedCache(Cache):
    """Keys and values of a model, in the pages of one `fastattn.PagedKVCache`.

    For ``generate(cache=...)``, in earlier versions ``generate(past_key_values=...)``, and for calls of the
    model itself. With ``attn_implementation="fastattn"`` new rows are written to their page, and attention
    reads the pages; nothing is concatenated or copied. Other implementations get a copy in one piece at each
    step. Sequences that beam search copies share their pages.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model: how many layers it has.
    page_size : int, optional
        Tokens a page. By default a quarter of the first prompt, as a power of two from 128 to 1024: CPUs read
        long rows of keys faster, and short sequences leave little of a page empty. 128 with `num_pages`.
    num_pages : int, optional
        Of a pool that never grows: where it is full, `fastattn.OutOfPagesError` is raised. By default the
        pool is made at the first call, and doubles when it is full.
    dtype : torch.dtype, optional
        ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``: rows are stored quantised. A prompt
        attends to its own rows as they are; what comes later reads what is stored. By default that of keys.

    Raises
    ------
    TypeError, ValueError
        For a `page_size` or `num_pages` that is no integer from 1 up, another `dtype`, and for a model with
        layers that keep something else than keys and values, such as recurrent ones; at the first call, for
        one whose layers differ in their heads or head dimensions.

    Notes
    -----
    All layers keep all tokens, those with a sliding window too. Padding on the left is not stored; it has to
    be masked for as long as the cache is used, as `generate` does. The cache belongs to one batch until
    `reset`. It is for self-attention: where there is an encoder, give
    ``EncoderDecoderCache(PagedCache(config), DynamicCache())``. It has no gradients.

    ``copy.deepcopy`` of it shares all pages until one of the two goes on: a prompt is computed once for any
    number of answers. ``pickle`` saves the pages that the cache holds, for another process.
    """

    def __init__(
        self,
        config: Any,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_settings(config, page_size, num_pages, dtype)
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ()) - set(_KEPT_TYPES)
        if kinds:
            raise ValueError(
                f"config: PagedCache keeps keys and values of attention, got layers of type {sorted(kinds)}"
            )
        self._pages = _Pages(config.num_hidden_layers, page_size, num_pages, dtype)
        self._own = [_PagedLayer(self._pages, index) for index in range(config.num_hidden_layers)]
        super().__init__(layers=list(self._own))

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return len(self._pages.sequences) or -1

    def usage(self) -> CacheUsage | None:
        """Return what the pool holds; None before the first call."""
        pool = self._pages.tidied_pool()
        return None if pool is None else pool.usage()

    def reset(self) -> None:
        """Forget all tokens and the batch. The pool stays, for the next one."""
        self._pages.forget()
        for layer in self._own:
            layer.length, layer.last = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back.

        Parameters
        ----------
        tokens_to_remove : int
            Minus their number. Before transformers 5, a number from 0 up is that of the tokens to keep.
        """
        length = self.get_seq_length()
        if tokens_to_remove < 0:
            kept = max(0, length + tokens_to_remove)
        elif _CROP_REMOVES:
            if tokens_to_remove:
                raise ValueError(f"tokens_to_remove must be negative, or 0, got {tokens_to_remove}")
            kept = length
        else:
            kept = min(length, tokens_to_remove)
        self._settle()
        self._pages.truncate(kept)
        for layer in self._own:
            layer.length = min(layer.length, kept)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence ``i`` go on from sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch, next to itself."""
        self._settle()
        self._pages.select([i for i in range(len(self._pages.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` of the batch, in that order; numbers, or a bool for each."""
        self._settle()
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._pages.select(indices.tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        self._settle()
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied._pages = self._pages.fork()
        copied._own = [_PagedLayer(copied._pages, layer.index, layer.length) for layer in self._own]
        copied.layers = list(copied._own)
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__

    def __repr__(self) -> str:
        return f"PagedCache(length={self.get_seq_length()}, {self._pages.tidied_pool()})"

    def _settle(self) -> None:
        for layer in self._own:
            layer.settle()


def _check_settings(config: Any, page_size: Any, num_pages: Any, dtype: Any) -> None:
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config must be that of a model, model.config, got {type(config).__qualname__}")
    for name, size in {"page_size": page_size, "num_pages": num_pages}.items():
        if size is not None:
            check_integer(name, size, least=1)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")


class _Pages:
    """What the layers of a cache share: the pool, the sequences of the batch, and where their tokens are.

    Position p of sequence b is its token ``p - starts[b]``: what comes before is padding, which has no place.
    """

    def __init__(
        self, layers: int, page_size: int | None, num_pages: int | None, dtype: torch.dtype | None
    ) -> None:
        self.layers, self.page_size, self.num_pages, self.dtype = layers, page_size, num_pages, dtype
        self.pool: PagedKVCache | None = None
        self.sizes: tuple[int, ...] = ()  # Hkv, D and Dv of the pool
        self.sequences: list[int] = []
        self.orphans: deque[int] = deque()  # sequences in the pool of forks that are gone
        self.forget()

    def forget(self) -> None:
        """Have no sequences, and no positions."""
        for sequence in self.sequences:
            self._pool.free(sequence)
        self.sequences = []
        self.starts: list[int] = []
        self.length = 0  # positions, of the layers that are ahead
        self.written = 0  # positions that some layer has written
        self.block_table: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None  # starts, where not all are 0

    @property
    def padded(self) -> bool:
        """Whether padding is left out before some sequence."""
        return self._padding is not None

    @property
    def _pool(self) -> PagedKVCache:
        assert self.pool is not None
        return self.pool

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make the pool for such rows at the first call, and a sequence for each of the batch."""
        batch, heads, tokens, head_dim = key.shape
        sizes = heads, head_dim, value.shape[3]
        if self.pool is None:
            page_size = self.page_size or _page_size_for(tokens if self.num_pages is None else 0)
            needed = batch * -(-max(1, tokens) // page_size)
            self.pool = PagedKVCache(
                *(self.num_pages or 2 * needed, page_size, *sizes),
                layers=self.layers,
                dtype=self.dtype or key.dtype,
                device=key.device,
                layout="bhsd",
            )
            self.sizes, self.orphans = sizes, deque()  # forks from before have pools of their own
        if sizes != self.sizes:
            raise ValueError(
                f"PagedCache keeps layers of one size, (heads, key dim, value dim) {self.sizes}, got {sizes}"
            )
        if not self.length:  # nothing is kept: what came before failed, or was taken back
            self.forget()
        if not self.sequences:
            self.sequences = [self.pool.allocate() for _ in range(batch)]
            self.starts = [0] * batch
        if len(self.sequences) != batch:
            held = len(self.sequences)
            raise ValueError(f"key_states must have the cache's batch of {held} sequences, got {batch}")

    def extend(self, length: int) -> None:
        """Have pages for `length` positions of each sequence."""
        if length <= self.length:
            return
        self.tidied_pool()
        try:
            step = self._pool.extend(self.sequences, length - self.length)
        except OutOfPagesError as error:
            if self.num_pages is not None:
                raise
            pages = self._pool.usage().pages
            self._pool.grow(pages + max(pages, error.needed - error.free))
            step = self._pool.extend(self.sequences, length - self.length)
        self.block_table, self.length = step["block_table"], length

    def leave_out(self, starts: Sequence[int], before: int) -> bool:
        """Have no place for what comes before `starts`, if no sequence has; return whether that is so.

        A sequence whose first `before` positions were all padding may begin later than it was thought to.
        """
        if self.starts == list(starts):
            return True
        for index, (held, start) in enumerate(zip(self.starts, starts, strict=True)):
            if start < held:
                got = f"tokens from {start} of sequence {index}, which began at {held} before"
                raise ValueError(f"attention_mask must hide the padding that PagedCache left out, got {got}")
            if start > held and (held < before or self.written > before):
                return False
        for sequence, start in zip(self.sequences, starts, strict=True):
            self._pool.truncate(sequence, self.length - start)
        self._set_starts(list(starts))
        return True

    def lengths(self, length: int) -> int | torch.Tensor:
        """Tokens of each sequence in the first `length` positions."""
        return length if self._padding is None else length - self._padding

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        """Store rows of the positions from `start` on."""
        rows = key.shape[2]
        self.written = max(self.written, start + rows)
        if all(first <= start for first in self.starts):
            starts = [start - first for first in self.starts]
            self._pool.write(self.sequences, key, value, start=starts, layer=layer)
            return
        for index, (sequence, first) in enumerate(zip(self.sequences, self.starts, strict=True)):
            real = slice(max(0, first - start), None)
            own = (states[index : index + 1, :, real] for states in (key, value))
            self._pool.write([sequence], *own, start=max(0, start - first), layer=layer)

    def dense(self, layer: int, place: int, length: int) -> torch.Tensor:
        """Return a copy of the keys (0) or values (1) of a layer, (B, Hkv, length, dim); padding is 0."""
        rows = [self._pool.read(sequence, layer=layer)[place] for sequence in self.sequences]
        heads, _, dim = rows[0].shape
        out: torch.Tensor = rows[0].new_zeros(len(rows), heads, length, dim)
        for index, first in enumerate(self.starts):
            out[index, :, first:] = rows[index][:, : max(0, length - first)]
        return out

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions of each sequence."""
        if length >= self.length:
            return
        for sequence, first in zip(self.sequences, self.starts, strict=True):
            self._pool.truncate(sequence, max(0, length - first))
        self.length, self.written = length, min(length, self.written)
        self._set_starts([min(first, length) for first in self.starts])

    def select(self, order: Sequence[int]) -> None:
        """Let the batch be these of its sequences, which share pages where one comes twice."""
        if self.pool is None:
            return
        parents = [self.sequences[index] for index in order]
        chosen = [self.pool.fork(parent) for parent in parents]
        for sequence in self.sequences:
            self.pool.free(sequence)
        self.sequences = chosen
        self._set_starts([self.starts[index] for index in order])

    def fork(self) -> _Pages:
        """Return others with the same tokens, which share the pool and the pages in it."""
        forked = _Pages(self.layers, self.page_size, self.num_pages, self.dtype)
        forked.__dict__.update(self.__dict__, sequences=[])
        if self.pool is not None:
            forked.sequences = [self.pool.fork(sequence) for sequence in self.sequences]
        return forked

    def __getstate__(self) -> dict[str, Any]:
        """What pickle takes: of a pool that forks share, the sequences of this one."""
        pool = copy.deepcopy(self.tidied_pool())
        if pool is not None:
            for sequence in set(pool.sequences).difference(self.sequences):
                pool.free(sequence)
        return {**self.__dict__, "pool": pool, "orphans": deque()}

    def _set_starts(self, starts: list[int]) -> None:
        self.starts = starts
        self.block_table = table = self._pool.batch(self.sequences)["block_table"]
        self._padding = torch.tensor(starts, dtype=torch.int32, device=table.device) if any(starts) else None

    def tidied_pool(self) -> PagedKVCache | None:
        """Return the pool, if there is one, with the sequences of forks that are gone freed."""
        while self.orphans:
            self._pool.free(self.orphans.popleft())
        return self.pool

    def __del__(self) -> None:
        # Freed by who goes on: a collection of garbage may strike anywhere, even inside the pool.
        self.orphans.extend(self.sequences)


def _page_size_for(tokens: int) -> int:
    """Tokens a page where a prompt has `tokens`."""
    smallest, largest = _PAGE_SIZES
    return min(largest, max(smallest, 1 << (tokens // 4).bit_length() >> 1))


class _Appended:
    """The rows that a layer was given last: written when attention reads the pages, or before."""

    def __init__(self, owner: _PagedLayer, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        self.owner, self.pages, self.layer, self.rows = owner, owner.pages, owner.index, (key, value)
        self.start, self.end = start, start + key.shape[2]
        self.written = False

    def write(self) -> None:
        """Write the rows, unless they are."""
        if not self.written:
            self.pages.write(self.layer, *self.rows, self.start)
            self._settle()

    def _settle(self) -> None:
        """The pages have the rows: the layer lets go of them, which of a prompt are as large as its pages."""
        self.written = True
        if self.owner.last is self:
            self.owner.last = None

    def attend(
        self, query: torch.Tensor, starts: Sequence[int] | None, arguments: dict[str, Any]
    ) -> torch.Tensor | None:
        """Write the rows, and attend over the pages of the layer: (B, Hq, Lq, D) to (B, Lq, Hq, Dv).

        `starts` says where sequences begin, after padding. None where the pages hold padding, or nothing but
        these rows.
        """
        pages = self.pages
        if starts is not None or pages.padded:
            starts = [0] * len(pages.starts) if starts is None else starts
            if not pages.leave_out(starts, self.start):
                return None
            if self.start and max(starts) > self.start:  # not all rows are tokens
                self.write()
        if not self.start:
            return None
        key, value = (None, None) if self.written else self.rows
        out: torch.Tensor = attention_with_kvcache(
            query,
            **pages._pool.layer(self.layer),
            new_key=key,
            new_value=value,
            block_table=pages.block_table,
            cache_seqlens=pages.lengths(self.end if self.written else self.start),
            **arguments,
        )
        self._settle()
        pages.written = max(pages.written, self.end)
        batch, heads, rows, dim = out.shape
        if rows == 1 and out.is_contiguous():
            return out.view(batch, 1, heads, dim)
        return out.transpose(1, 2).contiguous()

    def dense(self, place: int) -> torch.Tensor:
        """Return all keys (0) or values (1) of the layer, (B, Hkv, L, dim): these rows, or a copy."""
        self.write()
        return self.pages.dense(self.layer, place, self.end) if self.start else self.rows[place]


class PagedStates(torch.Tensor):
    """Keys or values (B, Hkv, L, D) that lie in pages.

    fastattn's attention function takes the pages; any operation of torch works on a copy in one piece.
    """

    appended: _Appended
    place: int  # 0: keys, 1: values

    @staticmethod
    def __new__(cls, appended: _Appended, place: int) -> PagedStates:
        """Return a tensor without storage."""
        rows = appended.rows[place]
        batch, heads, _, dim = rows.shape
        states: PagedStates = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, appended.end, dim), dtype=rows.dtype, device=rows.device
        )
        states.appended, states.place = appended, place
        return states

    def __init__(self, *_: Any) -> None:
        pass

    def dense(self) -> torch.Tensor:
        """Return a copy in one piece."""
        return self.appended.dense(self.place).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the class and the function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do `func` on copies."""
        args, kwargs = tree_map_only(PagedStates, PagedStates.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PagedStates(shape={tuple(self.shape)}, dtype={self.dtype})"


class _PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # of its __init_subclass__
    """One layer of a `PagedCache`, as transformers sees it."""

    is_sliding = False
    is_croppable = True

    def __init__(self, pages: _Pages, index: int, length: int = 0) -> None:
        self.pages, self.index, self.length = pages, index, length
        self.last: _Appended | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def is_initialized(self) -> bool:
        """Whether there is a pool."""
        return self.pages.pool is not None

    @is_initialized.setter
    def is_initialized(self, _: bool) -> None:  # the base class says that it is not
        pass

    @property
    def keys(self) -> torch.Tensor | None:
        """A copy of all keys, for code that looks at them."""
        return self._copied(0)

    @keys.setter
    def keys(self, _: torch.Tensor | None) -> None:  # as above
        pass

    @property
    def values(self) -> torch.Tensor | None:
        """A copy of all values."""
        return self._copied(1)

    @values.setter
    def values(self, _: torch.Tensor | None) -> None:
        pass

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Make the pool for rows like these; transformers 4 tells keys alone."""
        self.pages.prepare(key_states, key_states if value_states is None else value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (B, Hkv, n, D), and return all so far, (B, Hkv, L, D)."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("PagedCache keeps no graph: call the model under torch.no_grad()")
        self.settle()
        key, value = as_autocast_would(key_states, value_states)
        self.pages.prepare(key, value)
        start, end = self.length, self.length + key.shape[2]
        self.pages.extend(end)
        self.length = end
        self.last = _Appended(self, key, value, start)
        return PagedStates(self.last, 0), PagedStates(self.last, 1)

    def settle(self) -> None:
        """Write the rows that no attention has written."""
        if self.last is not None:
            self.last.write()

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """(Lk, 0) of a mask for so many queries; transformers 4 tells their positions."""
        queries = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.length + queries, 0

    def get_seq_length(self) -> int:
        """Return the tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """-1: as many as there are pages for."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def _of_the_cache(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("layers of a PagedCache go together: call this method of the cache")

    # What the base class, or another layer, does with keys and values of its own.
    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _of_the_cache
    offload = prefetch = _of_the_cache

    def _copied(self, place: int) -> torch.Tensor | None:
        self.settle()
        return self.pages.dense(self.index, place, self.length) if self.length else None
