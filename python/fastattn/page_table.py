"""Which pages hold the tokens of which sequence: the bookkeeping of a paged cache, and none of its memory."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["OutOfPagesError", "PageTable", "SharedPrefix"]


class OutOfPagesError(RuntimeError):
    """A paged cache has fewer free pages than a call needs. The call has changed nothing.

    Attributes
    ----------
    needed, free : int
        Pages that the call needs, and those that are free.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"out of pages: {needed} needed, {free} of {total} free; free or truncate sequences, "
            "or make a larger cache"
        )
        self.needed = needed
        self.free = free


class SharedPrefix(NamedTuple):
    """Sequences whose first pages are the same.

    Attributes
    ----------
    members : tuple of int
        Their places in the list of sequences that was asked about.
    pages : int
        How many leading pages, all of them full, they share; 0 for a sequence on its own.
    """

    members: tuple[int, ...]
    pages: int


def _no_pages() -> array[int]:
    return array("i")


@dataclass
class _Held:
    """One sequence: its tokens, and the pages that it holds, in order; the last may have no token yet."""

    length: int = 0
    pages: array[int] = field(default_factory=_no_pages)


class PageTable:
    """Pages by number, and who holds them. The free page of the lowest number is always taken first.

    A page is written by a sequence that holds it alone: `make_room` gives a sequence that is about to write
    to a shared page a page of its own, and has it copied.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.references: NDArray[np.int32] = np.zeros(num_pages, np.int32)  # sequences that hold each page
        self._free = list(range(num_pages))  # a heap
        self._sequences: dict[int, _Held] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The live ones, from the oldest to the youngest."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._held(sequence).length

    def pages(self, sequence: int) -> array[int]:
        """Numbers of the pages of a sequence, in order."""
        return self._held(sequence).pages

    def allocate(self) -> int:
        """Return the number of a new, empty sequence. Numbers are never used twice."""
        self._sequences[self._next] = _Held()
        self._next += 1
        return self._next - 1

    def fork(self, sequence: int, length: int) -> int:
        """Return a new sequence that shares the first `length` tokens of another, and their pages."""
        pages = self._held(sequence).pages[: self._pages_for(length)]
        forked = self.allocate()
        self._sequences[forked] = _Held(length, pages)
        self.references[np.asarray(pages)] += 1
        return forked

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens, and give back the pages that held none of them."""
        held = self._held(sequence)
        kept = self._pages_for(length)
        self._give_back(held.pages[kept:])
        del held.pages[kept:]
        held.length = length

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        self._give_back(self._held(sequence).pages)
        del self._sequences[sequence]

    def make_room(self, growth: Mapping[int, int], copy: Callable[[list[int], list[int]], None]) -> None:
        """Let each sequence have pages for so many more tokens, and the one it writes to first to itself.

        ``copy(old, new)`` copies what is in pages. It comes before any change, as `OutOfPagesError` does, so
        that nothing has changed if it fails.
        """
        plan: list[tuple[_Held, bool, int]] = []
        left: Counter[int] = Counter()  # shared pages that sequences of this call leave to the others
        for sequence, tokens in growth.items():
            held = self._held(sequence)
            last = self._page_written_first(held) if tokens else None
            leaves = last is not None and self.references[last] - left[last] > 1
            if leaves and last is not None:
                left[last] += 1
            plan.append((held, leaves, self._pages_for(held.length + tokens) - len(held.pages)))
        needed = sum(leaves + max(new, 0) for _, leaves, new in plan)
        if needed > len(self._free):
            raise OutOfPagesError(needed, len(self._free), len(self.references))

        leaving = [(held, held.length // self.page_size) for held, leaves, _ in plan if leaves]
        if leaving:
            copy([held.pages[slot] for held, slot in leaving], heapq.nsmallest(len(leaving), self._free))
        for held, slot in leaving:
            self.references[held.pages[slot]] -= 1
            held.pages[slot] = self._take()
        for held, _, new in plan:
            held.pages.extend(self._take() for _ in range(new))

    def append(self, growth: Mapping[int, int]) -> None:
        """Count tokens that `make_room` made room for."""
        for sequence, tokens in growth.items():
            self._held(sequence).length += tokens

    def grow(self, num_pages: int) -> None:
        """Have so many pages altogether; those there are keep their numbers."""
        total = len(self.references)
        self._free.extend(range(total, num_pages))  # larger than all that are in the heap, so it stays one
        self.references = np.pad(self.references, (0, num_pages - total))

    def held_pages(self) -> NDArray[np.int32]:
        """Numbers of the pages that are held, in the order in which sequences hold them."""
        held = dict.fromkeys(page for held in self._sequences.values() for page in held.pages)
        return np.array(list(held), np.int32)

    def renumber(self, old: NDArray[np.int32]) -> None:
        """Call the held page ``old[i]`` page ``i``."""
        new = {page: number for number, page in enumerate(old.tolist())}
        for held in self._sequences.values():
            held.pages = array("i", [new[page] for page in held.pages])
        references = self.references[old]
        self.references[:] = 0
        self.references[: len(old)] = references
        self._free = list(range(len(old), len(self.references)))

    def shared_prefixes(self, sequences: Sequence[int]) -> list[SharedPrefix]:
        """Group sequences by the full pages at their start, so that the fewest pages are read in all."""
        full = [self.pages(sequence)[: self.length(sequence) // self.page_size] for sequence in sequences]
        return _best_groups(full)

    def _held(self, sequence: int) -> _Held:
        held = self._sequences.get(sequence)
        if held is None and not isinstance(sequence, (int, np.integer)):
            raise TypeError(f"a sequence must be an integer, got {type(sequence).__qualname__}")
        if held is None:
            raise ValueError(f"sequence {sequence} is not in the cache: it was freed, or never allocated")
        return held

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _page_written_first(self, held: _Held) -> int | None:
        """The page that the next token goes to, if the sequence has written to it before."""
        slot, row = divmod(held.length, self.page_size)
        return held.pages[slot] if row else None

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self.references[page] = 1
        return page

    def _give_back(self, pages: array[int]) -> None:
        numbers = np.asarray(pages)
        self.references[numbers] -= 1
        for page in numbers[self.references[numbers] == 0].tolist():
            heapq.heappush(self._free, page)


def _best_groups(full: Sequence[array[int]]) -> list[SharedPrefix]:
    """Group sequences, given by their full pages, so that the fewest pages are read.

    Their prefixes form a tree. Whoever is in a group is spared the reading of its prefix, which is read once
    for all; so each sequence is best off in the deepest group on its way down the tree.
    """

    @cache
    def saved_by(members: tuple[int, ...], depth: int, above: int) -> _Grouping:
        """The best groups for the branch where `members` share `depth` pages, below a group with `above`."""
        if len(members) == 1:
            return _Grouping(above, (), members)
        shortest = min(len(full[member]) for member in members)
        while depth < shortest and len({full[member][depth] for member in members}) == 1:
            depth += 1
        branches: dict[int, tuple[int, ...]] = {}
        for member in members:
            ended = len(full[member]) == depth
            branch = ~member if ended else full[member][depth]  # what has ended is a branch of its own
            branches[branch] = (*branches.get(branch, ()), member)

        def grouped(nearest: int) -> _Grouping:
            found = [saved_by(branch, depth, nearest) for branch in branches.values()]
            saved, groups, left = zip(*found, strict=True)
            return _Grouping(sum(saved), sum(groups, ()), sum(left, ()))

        without, here = grouped(above), grouped(depth)
        if here.saved - depth <= without.saved:
            return without
        group = SharedPrefix(tuple(sorted(here.left)), depth)
        return _Grouping(here.saved - depth, (*here.groups, group), ())

    if not full:
        return []
    best = saved_by(tuple(range(len(full))), 0, 0)
    return sorted([*best.groups, *(SharedPrefix((member,), 0) for member in best.left)])


class _Grouping(NamedTuple):
    """Page reads saved, the groups, and the sequences that are left to a group above."""

    saved: int
    groups: tuple[SharedPrefix, ...]
    left: tuple[int, ...]
