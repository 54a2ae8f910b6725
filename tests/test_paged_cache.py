"""PagedKVCache: pages, dtypes, sharing, refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa
from fastattn.page_pool import PagePool
from fastattn.page_table import SharedPrefix

torch = pytest.importorskip("torch")


def cache_of(num_pages: int = 8, page_size: int = 4, **options: Any) -> fa.PagedKVCache:
    return fa.PagedKVCache(num_pages, page_size, 2, 8, **options)


def filled(cache: fa.PagedKVCache, tokens: int) -> int:
    """A new sequence of so many tokens."""
    sequence = cache.allocate()
    cache.extend([sequence], tokens)
    return sequence


def pages(cache: fa.PagedKVCache, *sequences: int) -> list[list[int]]:
    return np.asarray(cache.batch(sequences)["block_table"]).tolist()


# --- pages -------------------------------------------------------------------------------------------------


def test_the_free_page_of_the_lowest_number_is_taken():
    cache = cache_of()
    first, second, third = (filled(cache, 8) for _ in range(3))
    assert pages(cache, first, second, third) == [[0, 1], [2, 3], [4, 5]]
    cache.free(second)
    cache.truncate(first, 3)
    step = cache.extend([third, first], [9, 2])
    assert step["block_table"].tolist() == [[4, 5, 1, 2, 3], [0, 6, -1, -1, -1]]
    assert step["cache_seqlens"].tolist() == [8, 3]
    assert step["block_table"].dtype == step["cache_seqlens"].dtype == np.int32


def test_of_two_that_share_a_page_one_keeps_it():
    cache = cache_of(3)
    first = filled(cache, 6)
    second = cache.fork(first)
    assert cache.usage().free_pages == 1
    cache.extend([first, second], 1)  # needs one page, not two
    assert pages(cache, first, second) == [[0, 2], [0, 1]]
    third = cache.fork(first)
    with pytest.raises(fa.OutOfPagesError, match=r"^out of pages: 1 needed, 0 of 3 free; free or truncate"):
        cache.extend([first, third, second], 1)
    assert pages(cache, first, second, third) == [[0, 2], [0, 1], [0, 2]]
    assert [cache.length(sequence) for sequence in (first, second, third)] == [7, 7, 7]


@pytest.mark.parametrize("fails", ["copy", "integers"])
def test_a_failing_extension_changes_nothing(fails: str, monkeypatch: pytest.MonkeyPatch):
    """Where there is no memory to copy a shared page by, or for what a call is given."""
    cache = cache_of(8, page_size=4)
    first, other = filled(cache, 6), filled(cache, 5)
    written = np.random.default_rng(1).standard_normal((2, 1, 6, 2, 8)).astype(np.float32)
    cache.write([first], *written, layer=0)
    second = cache.fork(first)
    rows = cache.read(second, layer=0)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache._pool, fails, fail)
        with pytest.raises(MemoryError):
            cache.extend([other, second], [9, 1])
    assert [cache.length(sequence) for sequence in (first, second, other)] == [6, 6, 5]
    for found, expected in zip(cache.read(second, layer=0), rows, strict=True):
        np.testing.assert_array_equal(found, expected)
    cache.extend([other, second], [9, 1])
    for found, expected in zip(cache.read(second, layer=0), rows, strict=True):
        np.testing.assert_array_equal(found[:6], expected)
    cache.free(second)
    cache.free(other)
    assert cache.usage().used_pages == 2


def test_a_fork_of_whole_pages_copies_none():
    cache = cache_of(3)
    first = filled(cache, 8)
    second = cache.fork(first, 4)
    cache.extend([second], 4)
    assert pages(cache, first, second) == [[0, 1], [0, 2]]
    assert isinstance(fa.OutOfPagesError(1, 0, 3), RuntimeError)


def test_what_is_reserved_cannot_run_out():
    cache = cache_of(4)
    first, second = cache.allocate(), cache.allocate()
    cache.reserve([first], 9)
    assert cache.usage().used_pages == 3 and cache.length(first) == 0
    assert pages(cache, first) == [[]]
    with pytest.raises(fa.OutOfPagesError):
        cache.extend([second], 5)
    with pytest.raises(fa.OutOfPagesError, match="2 needed, 1 of 4 free"):
        cache.extend([first, second], [1, 5])
    cache.extend([second], 4)
    cache.extend([first], 9)
    assert pages(cache, first) == [[0, 1, 2]]


def test_defragment_and_grow():
    cache = cache_of(6, page_size=2, layers=2)
    dropped, kept, other = (filled(cache, 4) for _ in range(3))
    rows = np.arange(2 * 4 * 2 * 8, dtype=np.float32).reshape(2, 4, 2, 8)
    for layer in range(2):
        cache.write([kept, other], rows + 1000 * layer, -rows, layer=layer)
    cache.free(dropped)
    cache.extend([kept], 1)
    assert pages(cache, kept, other) == [[2, 3, 0], [4, 5, -1]]
    cache.truncate(kept, 4)
    fork = cache.fork(other)
    cache.defragment()
    cache.free(fork)
    cache.grow(7)
    assert pages(cache, kept, other) == [[0, 1], [2, 3]]
    for index, sequence in enumerate((kept, other)):
        for layer in range(2):
            key, value = cache.read(sequence, layer=layer)
            assert np.array_equal(key, rows[index] + 1000 * layer) and np.array_equal(value, -rows[index])
    cache.extend([other], 6)
    assert pages(cache, other) == [[2, 3, 4, 5, 6]]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pages", "boundary"), [(3, 64), (2000, 1 << 21)], ids=["small", "large"])
def test_memory_begins_with_a_line_or_a_huge_page(dtype, pages, boundary):
    """And a page of all layers is one piece of it, so that what is not used is left alone."""
    cache = fa.PagedKVCache(pages, 64, 2, 8, layers=3, dtype=dtype)
    cache.grow(pages + 1)
    for name in ("key_cache", "value_cache"):
        layers = [cache.layer(layer)[name] for layer in range(3)]
        if dtype is torch.bfloat16:
            layers = [layer.view(torch.int16).numpy() for layer in layers]
        at = [layer.__array_interface__["data"][0] for layer in layers]
        assert at[0] % boundary == 0
        assert [there - at[0] for there in at] == [0, 2048, 4096]  # 64 tokens, 2 heads, 8 numbers of 2 bytes
        assert layers[0].strides[0] == 6144


def test_layers_can_be_had_while_the_pool_grows(monkeypatch):
    cache = cache_of(8, layers=3)
    asked, found, grow = threading.Event(), [], cache._pool.grow

    def slowly(pages):
        asked.set()
        thread.join(0.1)
        assert not found  # it waits
        grow(pages)

    def ask():
        asked.wait()
        found.append(cache.layer(2))

    monkeypatch.setattr(cache._pool, "grow", slowly)
    thread = threading.Thread(target=ask)
    thread.start()
    cache.grow(16)
    thread.join()
    assert found[0]["key_cache"].shape[0] == 16


@pytest.mark.parametrize(
    ("call", "where", "before"),
    [(lambda cache: cache.grow(5), "_empty", 1), (lambda cache: cache.defragment(), "reorder", 0)],
    ids=["grow", "defragment"],
)
def test_where_memory_runs_out_nothing_has_moved(call, where, before, monkeypatch):
    """For the larger values, after keys were moved, or for a layer in another order."""
    cache = cache_of(4, page_size=2)
    dropped, kept = filled(cache, 4), filled(cache, 3)
    rows = np.arange(3 * 2 * 8, dtype=np.float32).reshape(1, 3, 2, 8)
    cache.write([kept], rows, -rows)
    cache.free(dropped)
    usage, real, left = cache.usage(), getattr(PagePool, where), [None] * before

    def fails(*arguments: Any) -> Any:
        if not left:
            raise MemoryError
        left.pop()
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(PagePool, where, fails)
        call(cache)
    assert cache.usage() == usage
    for again in (False, True):
        if again:
            call(cache)
        assert all(np.array_equal(a, b) for a, b in zip(cache.read(kept), (rows[0], -rows[0]), strict=True))
        fa.attention_with_kvcache(rows[:, :1], **cache.layer(0), **cache.batch([kept]))


def test_usage():
    cache = cache_of(8, layers=3, value_dim=4, dtype=torch.float8_e5m2)
    sequence = filled(cache, 9)
    cache.fork(sequence)
    cache.extend([filled(cache, 0)], 1)
    per_page = 3 * 4 * 2 * ((8 + 4) * 1 + 2 * 4)
    assert cache.usage()._asdict() == {
        **{"sequences": 3, "tokens": 19, "pages": 8, "used_pages": 4, "free_pages": 4, "shared_pages": 3},
        **{"nbytes": 8 * per_page, "used_nbytes": 4 * per_page},
    }
    assert repr(cache) == "PagedKVCache(3 sequences, 19 tokens, 4 of 8 pages of 4, float8_e5m2)"


# --- shared prefixes ---------------------------------------------------------------------------------------


def test_prefixes_that_are_shared():
    cache = cache_of(64, page_size=2)
    system = filled(cache, 7)  # three full pages
    others = [cache.fork(system) for _ in range(3)]
    cache.extend([system, *others], 20)
    deep = cache.fork(others[0])
    alone = filled(cache, 9)
    # A group of three would share three pages; two of them share thirteen.
    assert cache.shared_prefixes([others[0], alone, others[1], deep]) == [
        SharedPrefix((0, 3), 13),
        SharedPrefix((1,), 0),
        SharedPrefix((2,), 0),
    ]
    assert cache.shared_prefixes([others[0], system, others[1], deep]) == [
        SharedPrefix((0, 3), 13),
        SharedPrefix((1, 2), 3),
    ]
    assert cache.shared_prefixes([others[0], others[1], others[2], alone]) == [
        SharedPrefix((0, 1, 2), 3),
        SharedPrefix((3,), 0),
    ]
    assert cache.shared_prefixes([deep, deep]) == [SharedPrefix((0, 1), 13)]
    assert cache.shared_prefixes([]) == []


def partitions(members: list[int]) -> Any:
    if not members:
        yield []
        return
    first, *rest = members
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for tail in partitions([member for member in rest if member not in others]):
                yield [(first, *others), *tail]


def test_no_other_groups_read_fewer_pages(rng):
    for _ in range(60):
        cache = cache_of(200, page_size=1)
        sequences = [filled(cache, int(rng.integers(1, 4)))]
        for _ in range(4):
            origin = sequences[rng.integers(len(sequences))]
            sequences.append(cache.fork(origin, int(rng.integers(cache.length(origin) + 1))))
            cache.extend([sequences[-1]], int(rng.integers(4)))
        tables = [pages(cache, sequence)[0] for sequence in sequences]

        def reads(groups, tables=tables):
            total = 0
            for group in groups:
                agree = [
                    len(set(column)) == 1
                    for column in zip(*(tables[member] for member in group), strict=False)
                ]
                shared = agree.index(False) if False in agree else len(agree)
                total += sum(len(tables[member]) for member in group) - (len(group) - 1) * shared
            return total

        groups = cache.shared_prefixes(sequences)
        saved = sum((len(group.members) - 1) * group.pages for group in groups)
        found = reads([group.members for group in groups])
        assert found == sum(map(len, tables)) - saved
        assert found == min(map(reads, partitions(list(range(len(sequences))))))


# --- dtypes ------------------------------------------------------------------------------------------------

PLAIN = ["float64", "float32", "float16", ml_dtypes.bfloat16]
PLAIN += [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_rows_come_back_as_they_were(dtype, layout, rng):
    cache = fa.PagedKVCache(6, 3, 2, 8, 5, layers=2, dtype=dtype, layout=layout)
    lengths = [7, 4]
    sequences = [filled(cache, length) for length in lengths]
    axes = (2, 4, 2) if layout == "bshd" else (2, 2, 4)
    given = [rng.standard_normal((*axes, dim)).astype(np.float32) for dim in (8, 5)]
    on_torch = isinstance(dtype, torch.dtype)
    rows = [torch.from_numpy(array).to(dtype) if on_torch else array.astype(dtype) for array in given]
    cache.write(sequences, *rows, layer=1)  # the last four of each
    for index, sequence in enumerate(sequences):
        for held, written in zip(cache.read(sequence, layer=1), rows, strict=True):
            held = held if layout == "bshd" else held.swapaxes(0, 1)
            written = written[index] if layout == "bshd" else written[index].swapaxes(0, 1)
            assert held.dtype == written.dtype and held.shape[0] == lengths[index]
            assert (held[-4:] == written).all()
    cache.write(sequences[:1], *(array[:1] for array in rows), start=0, layer=1)
    again = cache.read(sequences[0], layer=1)[1]
    again = again if layout == "bshd" else again.swapaxes(0, 1)
    expected = rows[1][0] if layout == "bshd" else rows[1][0].swapaxes(0, 1)
    assert (again[:4] == expected).all() and (again[4:] == expected[1:]).all()


# --- copies ------------------------------------------------------------------------------------------------

DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}
QUANTISED = ["int8", ml_dtypes.float8_e4m3fn, torch.int8, torch.float8_e5m2]


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [*PLAIN, *QUANTISED], ids=str)
def test_copies_hold_the_same_and_go_on_apart(dtype, layout, duplicate, rng):
    cache = fa.PagedKVCache(6, 4, 2, 8, 5, layers=2, dtype=dtype, layout=layout)
    gone, first = filled(cache, 4), filled(cache, 6)
    axes = (1, 6, 2) if layout == "bshd" else (1, 2, 6)
    given = [rng.standard_normal((*axes, dim)).astype(np.float32) for dim in (8, 5)]
    if dtype in PLAIN:
        own = cache.layer(0)["key_cache"].dtype
        given = [
            torch.from_numpy(x).to(own) if isinstance(own, torch.dtype) else x.astype(own) for x in given
        ]
    elif isinstance(dtype, torch.dtype):
        given = [torch.from_numpy(x) for x in given]
    for layer in range(2):
        cache.write([first], *given, layer=layer)
    fork = cache.fork(first)
    cache.free(gone)
    before = cache.usage()

    other = duplicate(cache)
    assert other.usage() == before and repr(other) == repr(cache)
    assert pages(other, first, fork) == [[1, 2], [1, 2]]
    for mine, theirs in zip(other.layer(1).values(), cache.layer(1).values(), strict=True):
        assert type(mine) is type(theirs)
        if not isinstance(mine, str):
            assert mine.dtype == theirs.dtype
            strides = [x.strides if isinstance(x, np.ndarray) else x.stride() for x in (mine, theirs)]
            assert strides[0] == strides[1]
    for layer, sequence in itertools.product(range(2), (first, fork)):
        arrays = zip(other.read(sequence, layer=layer), cache.read(sequence, layer=layer), strict=True)
        assert all((mine == theirs).all() for mine, theirs in arrays)

    other.extend([first, fork], 5)
    other.write([fork], *given, start=5)
    assert cache.usage() == before and cache.length(fork) == 6
    assert other.allocate() == cache.allocate()


CODES = {
    "int8": np.arange(-127, 128, dtype=np.float32),
    "float8_e4m3fn": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "float8_e5m2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32),
}


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", CODES)
def test_a_quantised_row_is_the_nearest_there_is(name, library, rng):
    """Of all codes under its scale, each number is stored as one that is nearest."""
    codes = CODES[name][np.isfinite(CODES[name])]
    cache = fa.PagedKVCache(2, 8, 2, 16, 3, dtype=torch_dtype(name) if library == "torch" else name)
    sequence = filled(cache, 13)
    rows = [rng.standard_normal((1, 13, 2, dim)).astype(np.float32) for dim in (16, 3)]
    rows[0][0, 0] *= 1e-41  # scales that are subnormal
    rows[0][0, 1] = 0
    rows[0][0, 2] *= 1e30
    cache.write([sequence], *(torch.from_numpy(array) if library == "torch" else array for array in rows))
    arrays = cache.layer(0)
    for kind, (held, written) in enumerate(zip(cache.read(sequence), rows, strict=True)):
        scale = np.asarray(arrays["key_scale" if kind == 0 else "value_scale"]).reshape(16, 2)[:13]
        largest = np.abs(written[0]).max(-1)
        np.testing.assert_allclose(scale, largest / codes.max(), rtol=1e-6, atol=2e-45)
        held = np.asarray(held, np.float64)
        error = np.abs(held - written[0])
        levels = scale[..., None, None].astype(np.float64) * codes
        nearest = np.abs(levels - written[0][..., None]).min(-1)
        assert (error <= nearest * (1 + 1e-5) + 1e-44 + 1e-7 * np.abs(written[0])).all()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float16, "int8", *map(torch_dtype, CODES)], ids=str)
def test_rows_are_written_as_attention_writes_them(dtype, layout, rng):
    """And what `layer` and `extend` return are arguments of it."""
    given = [rng.standard_normal((2, 5, 2, 8)).astype(np.float32) for _ in range(2)]
    given[0][0, 1] = 0
    given[0][1, 1, 0, 3] = np.nan
    if layout == "bhsd":
        given = [array.swapaxes(1, 2) for array in given]
    if isinstance(dtype, torch.dtype):
        given = [torch.from_numpy(array) for array in given]
    if dtype == torch.float16:
        given = [tensor.to(dtype) for tensor in given]
    caches = [cache_of(dtype=dtype, layout=layout, layers=2) for _ in range(2)]
    for cache in caches:
        sequences = [filled(cache, 2), filled(cache, 0)]
        step = cache.extend(sequences, 5)
        for array in cache._pool.arrays.values():
            array[...] = 0  # the oracle reads whole pages
        if cache is caches[0]:
            cache.write(sequences, *given, layer=1)
        else:
            rows = {"new_key": given[0], "new_value": given[1]}
            fa.attention_with_kvcache(given[0], **cache.layer(1), **rows, **step, backend="reference")
    for sequence, start in zip(sequences, (2, 0), strict=True):
        for written, appended in zip(*(cache.read(sequence, layer=1) for cache in caches), strict=True):
            axis = 0 if layout == "bshd" else 1
            written, appended = (np.asarray(rows).swapaxes(0, axis)[start:] for rows in (written, appended))
            assert np.array_equal(written, appended, equal_nan=True)


@pytest.mark.parametrize("dtype", ["int8", torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_nan(dtype, bad):
    cache = fa.PagedKVCache(1, 2, 1, 4, dtype=dtype)
    sequence = filled(cache, 2)
    rows = np.ones((1, 2, 1, 4), np.float32)
    rows[0, 1, 0, 2] = bad
    rows = rows if isinstance(dtype, str) else torch.from_numpy(rows)
    cache.write([sequence], rows, rows)
    for held in map(np.asarray, cache.read(sequence)):
        assert (held[0] == 1).all() and np.isnan(held[1]).all()


def test_other_floats_may_be_quantised():
    cache = fa.PagedKVCache(1, 4, 1, 4, dtype=torch.int8)
    sequence = filled(cache, 1)
    rows = torch.tensor([[[[1.0, -2.0, 0.5, 4.0]]]], dtype=torch.bfloat16)
    cache.write([sequence], rows, rows.double())
    assert cache.layer(0)["key_cache"][0, 0, 0].tolist() == [32, -64, 16, 127]
    assert cache.layer(0)["value_cache"].dtype == torch.int8


def test_a_pool_made_in_inference_mode_is_written_outside_of_it():
    with torch.inference_mode():
        cache = fa.PagedKVCache(2, 2, 1, 4, dtype=torch.float32)
    sequence = filled(cache, 3)
    rows = torch.ones(1, 3, 1, 4)
    cache.write([sequence], rows, rows)
    with torch.inference_mode():
        cache.write([sequence], rows, rows)
        cache.defragment()
    assert cache.read(sequence)[0].eq(1).all()


# --- threads -----------------------------------------------------------------------------------------------


def test_threads_that_share_a_prefix():
    cache = cache_of(400, page_size=3)
    prompt = filled(cache, 7)
    rows = np.ones((1, 7, 2, 8), np.float32)
    cache.write([prompt], rows, rows)
    failures = []

    def serve(number: int) -> None:
        try:
            for turn in range(20):
                sequence = cache.fork(prompt)
                for token in range(5):
                    cache.extend([sequence], 1)
                    cache.write([sequence], *[np.full((1, 1, 2, 8), 100 * number + token, np.float32)] * 2)
                key, _ = cache.read(sequence)
                expected = [1] * 7 + [100 * number + token for token in range(5)]
                assert key[:, 0, 0].tolist() == expected, (number, turn)
                cache.free(sequence)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.usage().used_pages == 3 and cache.sequences == (prompt,)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
        ({"page_size": 2.0}, TypeError, "page_size must be an integer, got float"),
        ({"layers": True}, TypeError, "layers must be an integer, got bool"),
        ({"value_dim": -1}, ValueError, "value_dim must be at least 1, got -1"),
        ({"layout": "sbhd"}, ValueError, "layout"),
        ({"dtype": "int16"}, TypeError, "dtype must be one of float64, .*, float8_e5m2, got int16"),
        ({"dtype": torch.bool}, TypeError, "dtype must be one of float64, .*, got bool"),
        ({"dtype": None}, TypeError, "dtype must be a dtype, got None"),
        ({"dtype": "float9"}, TypeError, "dtype must be a dtype, got 'float9'"),
        ({"device": "cpu"}, TypeError, "device: a cache of tensors needs a torch.dtype, got dtype 'float32'"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_cache(arguments, error, message):
    with pytest.raises(error, match=message):
        fa.PagedKVCache(**{"num_pages": 2, "page_size": 2, "kv_heads": 1, "head_dim": 4, **arguments})


CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "one": (lambda cache: cache.extend(0, 1), TypeError, "sequences must be a list of sequences, got int"),
    "tensors": (
        lambda cache: cache.extend(torch.tensor([0]), 1),
        TypeError,
        "a sequence must be an integer, got Tensor",
    ),
    "freed": (lambda cache: cache.free(7), ValueError, "sequence 7 is not in the cache"),
    "batch": (lambda cache: cache.batch([0, 7]), ValueError, "sequence 7 is not in the cache"),
    "twice": (lambda cache: cache.extend([0, 0], 1), ValueError, r"sequences must differ, got \[0, 0\]"),
    "counts": (
        lambda cache: cache.extend([0], [1, 2]),
        ValueError,
        "num_tokens must be one number, or 1, got 2",
    ),
    "written-twice": (
        lambda cache: cache.write([0, 0], numpy_rows(2, 1, 2, 8), numpy_rows(2, 1, 2, 8)),
        ValueError,
        r"sequences must differ, got \[0, 0\]",
    ),
    "negative": (lambda cache: cache.extend([0], -1), ValueError, "num_tokens must be at least 0, got -1"),
    "real": (lambda cache: cache.reserve([0], [1.5]), TypeError, "num_tokens must be an integer, got float"),
    "real-of-all": (
        lambda cache: cache.extend([0], 1.5),
        TypeError,
        "num_tokens must be an integer, got float",
    ),
    "long": (
        lambda cache: cache.truncate(0, 6),
        ValueError,
        "length must be at most the 5 tokens of sequence 0",
    ),
    "short": (lambda cache: cache.fork(0, -1), ValueError, "length must be at least 0, got -1"),
    "layer": (lambda cache: cache.layer(1), ValueError, "layer must be below 1, got 1"),
    "read": (lambda cache: cache.read(0, layer=-1), ValueError, "layer must be at least 0, got -1"),
    "smaller": (lambda cache: cache.grow(8), ValueError, "num_pages must be above 8, got 8"),
}


@pytest.mark.parametrize("call", CALLS)
def test_bad_calls_change_nothing(call):
    function, error, message = CALLS[call]
    cache = cache_of()
    filled(cache, 5)
    before = cache.usage(), pages(cache, 0), cache.length(0)
    with pytest.raises(error, match=message):
        function(cache)
    assert (cache.usage(), pages(cache, 0), cache.length(0)) == before


def numpy_rows(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


WRITES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "library": (torch.ones(1, 1, 2, 8), None, {}, TypeError, "key must be a NumPy array"),
    "list": ([[1.0]], None, {}, TypeError, "key must be a NumPy array"),
    "axes": (
        numpy_rows(1, 2, 8),
        None,
        {},
        ValueError,
        r"key must have shape \(1, 0, 2, 8\), got \(1, 2, 8\)",
    ),
    "heads": (numpy_rows(1, 1, 1, 8), None, {}, ValueError, r"shape \(1, 1, 2, 8\), got \(1, 1, 1, 8\)"),
    "value": (
        numpy_rows(1, 1, 2, 8),
        numpy_rows(1, 2, 2, 8),
        {},
        ValueError,
        r"value must have shape \(1, 1, 2",
    ),
    "dtype": (
        numpy_rows(1, 1, 2, 8, dtype=np.float64),
        None,
        {},
        TypeError,
        "key must have the dtype of the cache",
    ),
    "many": (numpy_rows(1, 6, 2, 8), None, {}, ValueError, "sequence 0 has 5 tokens, got tokens -1 to 5"),
    "past": (numpy_rows(1, 2, 2, 8), None, {"start": 4}, ValueError, "has 5 tokens, got tokens 4 to 6"),
    "start": (numpy_rows(1, 2, 2, 8), None, {"start": -1}, ValueError, "start must be at least 0, got -1"),
    "shared": (numpy_rows(1, 2, 2, 8), None, {"start": 3}, ValueError, "sequence 0 shares a page"),
}


@pytest.mark.parametrize("write", WRITES)
def test_bad_writes_write_nothing(write):
    key, value, options, error, message = WRITES[write]
    cache = cache_of()
    sequence = filled(cache, 5)
    cache.write([sequence], numpy_rows(1, 5, 2, 8) * 3, numpy_rows(1, 5, 2, 8) * 4)
    cache.fork(sequence, 4)
    with pytest.raises(error, match=message):
        cache.write([sequence], key, key if value is None else value, **options)
    key, value = cache.read(sequence)
    assert (key == 3).all() and (value == 4).all()


def test_a_cache_keeps_no_graph():
    cache = fa.PagedKVCache(1, 4, 1, 4, dtype=torch.float32)
    sequence = filled(cache, 1)
    rows = torch.ones(1, 1, 1, 4, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"key requires grad, and a cache keeps no graph: pass key.detach\(\)"
    ):
        cache.write([sequence], rows, rows)
    with torch.no_grad():
        cache.write([sequence], rows, rows)
    assert not cache.read(sequence)[0].requires_grad
    with pytest.raises(RuntimeError, match="key is on device 'meta', expected 'cpu'"):
        cache.write([sequence], rows.detach().to("meta"), rows)
