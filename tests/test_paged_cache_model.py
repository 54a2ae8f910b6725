"""PagedKVCache against a model of it: a list of tokens for each sequence, under any order of operations."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import fastattn as fa

torch = pytest.importorskip("torch")

PAGES, PAGE_SIZE, HEADS, LAYERS = 6, 3, 2, 2
MORE_PAGES = 9


def rows(tokens: list[int], layer: int, kind: int) -> np.ndarray:
    """(n, Hkv, dim) keys (kind 0) or values (1) that tell tokens, layers and heads apart.

    The largest is 127, so that int8 stores them exactly; bfloat16 does, too.
    """
    out = np.empty((len(tokens), HEADS, 4 - kind), np.float32)
    out[..., 0] = 127
    out[..., 1] = -20 * kind - 10 * layer - np.arange(HEADS)
    out[..., 2] = np.array(tokens, np.int64)[:, None] % 100
    out[..., 3:] = np.array(tokens, np.int64)[:, None, None] // 100
    return out


class Machine(RuleBasedStateMachine):
    """Sequences come and go, share and part; what they hold is read through their block tables."""

    dtype: ClassVar[Any] = "float32"
    layout: ClassVar[Any] = "bshd"
    sequences = Bundle("sequences")

    @initialize()
    def start(self) -> None:
        self.cache = fa.PagedKVCache(
            PAGES, PAGE_SIZE, HEADS, 4, 3, layers=LAYERS, dtype=self.dtype, layout=self.layout
        )
        self.pages = PAGES
        self.model: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}  # tokens for which there must be room
        self.anything_reserved = False
        self.next_token = 0

    @rule(target=sequences)
    def allocate(self) -> int:
        sequence = self.cache.allocate()
        assert sequence not in self.model
        self.model[sequence] = []
        return sequence

    @rule(sequence=sequences, other=sequences, counts=st.tuples(st.integers(0, 7), st.integers(0, 3)))
    def extend(self, sequence: int, other: int, counts: tuple[int, int]) -> None:
        """One or two sequences at once; where pages run out, nothing at all happens."""
        growth = (
            dict(zip((sequence, other), counts, strict=True)) if sequence != other else {sequence: counts[0]}
        )
        before, usage = self.tables(), self.cache.usage()
        try:
            step = self.cache.extend(list(growth), list(growth.values()))
        except fa.OutOfPagesError as error:
            assert error.needed > error.free == usage.free_pages
            assert any(count > self.reserved.get(s, 0) for s, count in growth.items())
            assert self.tables() == before and self.cache.usage() == usage
            return
        assert np.asarray(step["cache_seqlens"]).tolist() == [len(self.model[s]) for s in growth]
        for grown, count in growth.items():
            tokens = list(range(self.next_token, self.next_token + count))
            self.next_token += count
            self.model[grown] += tokens
            self.reserved[grown] = max(0, self.reserved.get(grown, 0) - count)
            self.write(grown, tokens)

    def write(self, sequence: int, tokens: list[int]) -> None:
        for layer in range(LAYERS):
            given = [self.given(rows(tokens, layer, kind)[None]) for kind in (0, 1)]
            self.cache.write([sequence], *given, layer=layer)

    def given(self, array: np.ndarray) -> Any:
        array = array.swapaxes(1, 2) if self.layout == "bhsd" else array
        if isinstance(self.dtype, str):
            return array
        tensor = torch.from_numpy(array)
        return tensor if self.dtype == torch.int8 else tensor.to(self.dtype)

    @rule(sequence=sequences, count=st.integers(0, 7))
    def reserve(self, sequence: int, count: int) -> None:
        usage = self.cache.usage()
        try:
            self.cache.reserve([sequence], count)
        except fa.OutOfPagesError:
            assert self.cache.usage() == usage
            return
        self.reserved[sequence] = max(count, self.reserved.get(sequence, 0))
        self.anything_reserved = True

    @rule(target=sequences, sequence=sequences, share=st.floats(0, 1) | st.none())
    def fork(self, sequence: int, share: float | None) -> int:
        tokens = self.model[sequence]
        length = None if share is None else round(share * len(tokens))
        forked = self.cache.fork(sequence, length)
        assert forked not in self.model
        self.model[forked] = tokens[:length]
        self.reserved[sequence] = 0
        return forked

    @rule(sequence=sequences, share=st.floats(0, 1))
    def truncate(self, sequence: int, share: float) -> None:
        length = round(share * len(self.model[sequence]))
        self.cache.truncate(sequence, length)
        del self.model[sequence][length:]
        self.reserved[sequence] = 0

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.model[sequence]
        self.reserved.pop(sequence, None)

    @rule()
    def defragment(self) -> None:
        used = self.cache.usage()
        self.cache.defragment()
        assert self.cache.usage() == used
        pages = [page for table in self.tables().values() for page in table]
        assert (
            not self.model
            or self.anything_reserved
            or list(dict.fromkeys(pages)) == list(range(len(set(pages))))
        )

    @rule()
    def grow(self) -> None:
        if self.pages == PAGES:
            self.cache.grow(MORE_PAGES)
            self.pages = MORE_PAGES

    def tables(self) -> dict[int, list[int]]:
        """Pages of each sequence."""
        if not self.model:
            return {}
        table = np.asarray(self.cache.batch(list(self.model))["block_table"])
        return {
            s: [page for page in row if page >= 0] for s, row in zip(self.model, table.tolist(), strict=True)
        }

    @invariant()
    def lengths_agree(self) -> None:
        assert self.cache.sequences == tuple(self.model)
        lengths = np.asarray(self.cache.batch(list(self.model))["cache_seqlens"]).tolist()
        assert lengths == [len(tokens) for tokens in self.model.values()]
        assert all(self.cache.length(s) == length for s, length in zip(self.model, lengths, strict=True))

    @invariant()
    def contents_agree(self) -> None:
        """Through the block table, as a kernel reads, and by `read`."""
        for layer in range(LAYERS):
            arrays = self.cache.layer(layer)
            for sequence, table in self.tables().items():
                tokens = self.model[sequence]
                assert len(table) == -(-len(tokens) // PAGE_SIZE)
                read = self.cache.read(sequence, layer=layer)
                for kind, name in enumerate(("key", "value")):
                    expected = rows(tokens, layer, kind)
                    found = self.found(arrays[f"{name}_cache"], table, len(tokens))
                    if self.dtype == torch.int8:
                        found = found * self.found(arrays[f"{name}_scale"], table, len(tokens))[..., None]
                    assert np.array_equal(found, expected)
                    again = as_float(read[kind])
                    assert np.array_equal(again.swapaxes(0, 1) if self.layout == "bhsd" else again, expected)

    def found(self, pages: Any, table: list[int], length: int) -> np.ndarray:
        """Rows of a layer's pages, through a block table: (length, Hkv, ...)."""
        pages = as_float(pages)
        pages = pages.swapaxes(1, 2) if self.layout == "bhsd" else pages
        found = [pages[table[i // PAGE_SIZE], i % PAGE_SIZE] for i in range(length)]
        return np.reshape(found, (length, *pages.shape[2:]))

    @invariant()
    def pages_are_accounted_for(self) -> None:
        usage, tables = self.cache.usage(), self.tables()
        holders: dict[int, int] = {}
        for table in tables.values():
            assert len(set(table)) == len(table)
            for page in table:
                assert 0 <= page < self.pages
                holders[page] = holders.get(page, 0) + 1
        assert usage.pages == self.pages == usage.used_pages + usage.free_pages
        assert usage.sequences == len(self.model) and usage.tokens == sum(map(len, self.model.values()))
        assert usage.shared_pages == sum(count > 1 for count in holders.values())
        assert usage.used_pages >= len(holders)
        assert self.anything_reserved or usage.used_pages == len(holders)
        assert usage.used_nbytes * usage.pages == usage.nbytes * usage.used_pages

    @invariant()
    def prefixes_are_shared(self) -> None:
        """Each sequence is in one group, whose pages are the same and full."""
        tables = list(self.tables().values())
        groups = self.cache.shared_prefixes(list(self.model))
        assert sorted(member for group in groups for member in group.members) == list(range(len(tables)))
        lengths = [len(tokens) // PAGE_SIZE for tokens in self.model.values()]
        for group in groups:
            prefixes = {tuple(tables[member][: group.pages]) for member in group.members}
            assert len(prefixes) == 1 and group.pages <= min(lengths[member] for member in group.members)


def as_float(array: Any) -> np.ndarray:
    return (array.float().numpy() if isinstance(array, torch.Tensor) else array).astype(np.float32)


class Tensors(Machine):
    dtype, layout = torch.bfloat16, "bhsd"


class Quantised(Machine):
    dtype, layout = torch.int8, "bhsd"


bounded = settings(deadline=None, derandomize=True, max_examples=20, stateful_step_count=40)


@pytest.mark.parametrize("machine", [Machine, Tensors, Quantised], ids=["numpy", "tensors", "quantised"])
def test_any_order_of_operations(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=bounded)
