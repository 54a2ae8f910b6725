"""The tables of `configs`: tiles of scores for each kind of GPU, of numbers, and of what a call asks for.

They are for Triton 3.6 and later; what a later one compiles better otherwise stands at the end, and `tables`
has both.

An entry is the fastest of those measured on a device of its kind, where there was one (bench/results, an H200
for sm90), and elsewhere the largest tile of those tried that keeps everything in registers. ``tests/gpu``
compiles every entry for its GPU, and holds it against what that has.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, TypeVar


class Tiles(NamedTuple):
    """Rows and columns of a tile of scores, warps of a program, stages of its pipeline of loads."""

    rows: int
    columns: int
    warps: int
    stages: int
    ahead: bool = False  # of the forward: the products of a tile begin a turn before their exponentials

    def options(self) -> dict[str, int]:
        """The arguments of a launch."""
        options = {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        return options | {"AHEAD": True} if self.ahead else options


class ForwardTiles(NamedTuple):
    """Tiles of the forward for what a call asks of its scores."""

    plain: Tiles  # products, of which a triangle may be hidden
    narrow: Tiles  # a window of few keys
    rich: Tiles  # a mask, a bias, dropout ...: what is read or computed for each score takes registers
    ragged: Tiles  # rich, with operands that do not fill their columns
    placed: Tiles  # plain, where keys need not begin at the first or lie in pages: a loop more, or addresses


class BackwardTiles(NamedTuple):
    """Tiles of the backward: of the kernel for key and value, and of that for query."""

    keys: Tiles
    queries: Tiles
    rich_keys: Tiles
    rich_queries: Tiles
    atomic_keys: Tiles  # of the first, where it adds up the gradient of query, too


Numbers: TypeAlias = tuple[str, int]  # "half", "float32" or "tf32", and the columns of a tile of operands
Row: TypeAlias = tuple[int, int, int, int]  # of Tiles
Entry = TypeVar("Entry", ForwardTiles, BackwardTiles)


class Tables(NamedTuple):
    """Tiles for one version of Triton."""

    forward: dict[str, dict[Numbers, ForwardTiles]]  # by kind of GPU
    backward: dict[str, dict[Numbers, BackwardTiles]]
    bias: dict[Numbers, Tiles]
    decode: dict[int, Tiles]


def _forward(plain: Row, narrow: Row, rich: Row, ragged: Row | None = None) -> ForwardTiles:
    return ForwardTiles(*(Tiles(*row) for row in (plain, narrow, rich, ragged or rich, plain)))


def _backward(
    keys: Row, queries: Row, rich_keys: Row, rich_queries: Row, atomic_keys: Row | None = None
) -> BackwardTiles:
    rows = keys, queries, rich_keys, rich_queries, atomic_keys or keys
    return BackwardTiles(*(Tiles(*row) for row in rows))


# "sm120" is also for what else has 99 KiB of shared memory.
FORWARD: dict[str, dict[Numbers, ForwardTiles]] = {
    "sm80": {
        ("half", 64): _forward((128, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        ("half", 128): _forward((128, 64, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("half", 256): _forward((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("float32", 64): _forward((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
        ("float32", 128): _forward((32, 32, 8, 1), (16, 32, 4, 2), (16, 32, 4, 1)),
        ("float32", 256): _forward((16, 64, 8, 1), (16, 32, 8, 1), (16, 64, 8, 1)),
        ("tf32", 64): _forward((128, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        ("tf32", 128): _forward((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
        ("tf32", 256): _forward((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
    "sm90": {
        ("half", 64): _forward((128, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 2)),
        ("half", 128): _forward((128, 128, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        ("half", 256): _forward((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)),
        ("float32", 64): _forward((128, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
        ("float32", 128): _forward((32, 32, 8, 1), (16, 32, 4, 2), (16, 32, 4, 1)),
        ("float32", 256): _forward((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("tf32", 64): _forward((128, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        ("tf32", 128): _forward((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
        ("tf32", 256): _forward((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
    "sm120": {
        ("half", 64): _forward((128, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        ("half", 128): _forward((64, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        ("half", 256): _forward((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
        ("float32", 64): _forward((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
        ("float32", 128): _forward((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 1)),
        ("float32", 256): _forward((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("tf32", 64): _forward((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        ("tf32", 128): _forward((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        ("tf32", 256): _forward((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
    "gfx942": {
        ("half", 64): _forward((128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
        ("half", 128): _forward((128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        ("half", 256): _forward((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        ("float32", 64): _forward((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        ("float32", 128): _forward((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
        ("float32", 256): _forward((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    },
}

BACKWARD: dict[str, dict[Numbers, BackwardTiles]] = {
    "sm80": {
        ("half", 64): _backward((32, 64, 8, 1), (64, 64, 4, 2), (16, 64, 4, 1), (64, 32, 4, 1)),
        ("half", 128): _backward((64, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        ("half", 256): _backward((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("float32", 64): _backward((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        ("float32", 128): _backward((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        ("float32", 256): _backward((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "sm90": {
        ("half", 64): _backward((64, 128, 8, 2), (128, 64, 4, 2), (32, 32, 8, 1), (64, 32, 4, 1)),
        ("half", 128): _backward(
            (32, 64, 4, 2), (64, 64, 4, 2), (16, 64, 8, 1), (64, 32, 8, 1), (32, 128, 8, 3)
        ),
        ("half", 256): _backward((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        ("float32", 64): _backward((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        ("float32", 128): _backward((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        ("float32", 256): _backward((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "gfx942": {
        ("half", 64): _backward((32, 64, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        ("half", 128): _backward((16, 64, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1)),
        ("half", 256): _backward((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("float32", 64): _backward((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 4, 1)),
        ("float32", 128): _backward((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("float32", 256): _backward((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}

# Of the kernel for the gradient of a bias, on every GPU.
BIAS: dict[Numbers, Tiles] = {
    ("half", 64): Tiles(64, 32, 8, 1),
    ("half", 128): Tiles(64, 32, 8, 1),
    ("half", 256): Tiles(16, 32, 8, 1),
    ("float32", 64): Tiles(16, 32, 8, 1),
    ("float32", 128): Tiles(16, 32, 8, 1),
    ("float32", 256): Tiles(16, 16, 8, 1),
}

# Of the forward over quantised caches, by columns, for queries of 16 bits; not measured.
FORWARD_QUANTISED = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 1)}
FORWARD_QUANTISED_GFX942 = FORWARD_QUANTISED | {256: Tiles(64, 16, 8, 1)}

# Of the backward with ids of segments, for 16 bits and up to 128 columns, on every GPU; not measured.
BACKWARD_SEGMENTS = Tiles(32, 16, 8, 1)

# By the rows of a tile, which are all queries of a group of heads.
DECODE: dict[int, Tiles] = {
    16: Tiles(16, 64, 2, 2),
    32: Tiles(32, 64, 4, 3),
    64: Tiles(64, 64, 4, 3),
    128: Tiles(128, 128, 8, 3),
}
DECODE_SM120 = Tiles(64, 32, 4, 3)  # there, from 64 rows on: more columns leave no registers
DECODE_RICH = Tiles(16, 32, 4, 1)  # also for float32
DECODE_RICH_SM120 = Tiles(16, 64, 8, 1)  # where four warps are short of registers, as on sm100
DECODE_WIDE = Tiles(16, 32, 8, 1)  # for head dimensions above 128
DECODE_QUANTISED = Tiles(16, 64, 4, 2)  # codes are made numbers by more threads; not measured

# What `tuning` tries besides, of the forward by numbers and of the decode: on Hopper exponentials hide behind
# the products of the next tile. Not measured.
FORWARD_AHEAD: dict[Numbers, tuple[Tiles, ...]] = {
    ("half", 64): (Tiles(128, 64, 8, 3, ahead=True), Tiles(128, 128, 8, 3, ahead=True)),
    ("half", 128): (Tiles(128, 64, 8, 3, ahead=True), Tiles(128, 64, 8, 4, ahead=True)),
}
DECODE_AHEAD = (Tiles(64, 64, 4, 2, ahead=True), Tiles(128, 64, 8, 3, ahead=True))

# What three products of TF32 fit into, one does.
for _gpu in ("sm80", "sm90"):
    BACKWARD[_gpu] |= {("tf32", columns): BACKWARD[_gpu]["float32", columns] for columns in (64, 128, 256)}
BIAS |= {("tf32", columns): BIAS["float32", columns] for columns in (64, 128, 256)}

# Gradients keep little in shared memory: the tiles of sm80 fit, but for some that need more registers there.
_queries = Tiles(16, 32, 8, 1)
BACKWARD["sm120"] = BACKWARD["sm80"] | {
    (kind, 64): BACKWARD["sm80"][kind, 64]._replace(queries=_queries) for kind in ("float32", "tf32")
}
BACKWARD["sm120"]["half", 64] = BACKWARD["sm80"]["half", 64]._replace(rich_keys=Tiles(16, 64, 8, 1))

# The same memory and registers, of which some tiles need a few more there.
FORWARD["sm100"] = dict(FORWARD["sm90"])
FORWARD["sm100"]["half", 128] = FORWARD["sm90"]["half", 128]._replace(
    narrow=Tiles(64, 32, 4, 2), placed=Tiles(128, 64, 8, 3)
)
FORWARD["sm100"]["tf32", 128] = FORWARD["sm90"]["tf32", 128]._replace(
    rich=Tiles(32, 32, 4, 1), ragged=Tiles(32, 32, 4, 1)
)
# Four warps to 64 rows are for Hopper's products, of one warpgroup each.
BACKWARD["sm100"] = BACKWARD["sm90"] | {
    ("half", 128): _backward((64, 64, 8, 2), (128, 64, 8, 2), (16, 64, 8, 1), (64, 32, 8, 1)),
}

# What the compilers of Triton 3.9, which deal registers out otherwise, keep in registers instead.
_FORWARD_39 = {
    "sm90": {("half", 128): {"placed": Tiles(128, 64, 8, 3)}},
    "sm120": {("tf32", 128): {"rich": Tiles(32, 32, 4, 1), "ragged": Tiles(32, 32, 4, 1)}},
    "gfx942": {("half", 128): {"plain": Tiles(64, 64, 8, 2), "placed": Tiles(64, 64, 8, 2)}},
}
_BACKWARD_39 = {
    "sm90": {
        ("half", 128): {
            "rich_keys": Tiles(32, 32, 8, 1),
            "rich_queries": Tiles(64, 32, 4, 1),
        },
        ("float32", 128): {"rich_queries": Tiles(16, 32, 8, 1)},
    },
    "sm100": {
        ("half", 128): {
            "keys": Tiles(64, 64, 8, 1),
            "queries": Tiles(128, 32, 8, 2),
            "atomic_keys": Tiles(64, 64, 8, 1),
        },
    },
    "sm120": {
        ("half", 128): {"queries": Tiles(128, 32, 8, 2)},
        ("float32", 128): {"keys": Tiles(16, 16, 4, 1), "queries": Tiles(32, 16, 8, 1)},
    },
    "gfx942": {("float32", 128): {"rich_queries": Tiles(32, 16, 8, 1)}},
}
_BIAS_39 = {("half", 128): Tiles(64, 16, 8, 1)}
_DECODE_39 = {128: Tiles(128, 64, 8, 3)}


def tables(version: str) -> Tables:
    """The tables for a version of Triton."""
    if not is_since_39(version):
        return Tables(FORWARD, BACKWARD, BIAS, DECODE)
    return Tables(
        _changed(FORWARD, _FORWARD_39),
        _changed(BACKWARD, _BACKWARD_39),
        BIAS | _BIAS_39,
        DECODE | _DECODE_39,
    )


def is_since_39(version: str) -> bool:
    """Whether a version of Triton is 3.9 or a later one."""
    return tuple(map(int, version.split(".")[:2])) >= (3, 9)


def _changed(
    table: dict[str, dict[Numbers, Entry]], changes: dict[str, dict[Numbers, dict[str, Tiles]]]
) -> dict[str, dict[Numbers, Entry]]:
    """A copy of `table` in which some fields of some entries are others."""
    changed = {gpu: dict(entries) for gpu, entries in table.items()}
    for gpu, entries in changes.items():
        for numbers, fields in entries.items():
            changed[gpu][numbers] = changed[gpu][numbers]._replace(**fields)
    return changed
