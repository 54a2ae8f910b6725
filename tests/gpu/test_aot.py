"""Kernels compiled ahead of time: nothing spilled, shared memory that there is, products by matrix units."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from compiled import ROOT, Records, Refused, compile_jobs, shipped_options
from jobs import AHEAD, JOBS, NEWEST, QUICK, QUICK_ONCE, QUICK_TARGETS, TARGETS
from limits import faults
from resources import PREFIX, RESULTS, Table, path_of, version_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# A folder with another Triton, in which all is compiled as well.
OTHER = os.environ.get("FASTATTN_TEST_TRITON")
TABLES = sorted(RESULTS.glob(f"{PREFIX}*.json"))


@cache
def compiled(target: str, names: tuple[str, ...], folder: Path | None) -> dict[str, Records | Refused]:
    return compile_jobs(TARGETS[target], names, folder)


def check(target: str, name: str, names: tuple[str, ...], folder: Path | None = None) -> None:
    records = compiled(target, names, folder)[name]
    if isinstance(records, Refused):
        pytest.fail(records, pytrace=False)
    assert records
    version = version_of(folder)
    wrong = {record["kernel"]: faults(record, JOBS[name], TARGETS[target], version) for record in records}
    assert not any(wrong.values()), wrong
    if (path := path_of(version)).exists():
        assert records == read(path)[target][name], f"{path.name} is out of date: make gpu-resources"


@cache
def read(path: Path) -> Table:
    table: Table = json.loads(path.read_text())
    return table


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_quick(target: str, name: str) -> None:
    check(target, name, QUICK)


@pytest.mark.parametrize(("target", "name"), QUICK_ONCE)
def test_once(target: str, name: str) -> None:
    check(target, name, (name,))


@pytest.mark.gpu_slow
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("target", TARGETS)
def test_all(target: str, name: str) -> None:
    check(target, name, tuple(JOBS))


@pytest.mark.gpu_slow
@pytest.mark.skipif(OTHER is None, reason="FASTATTN_TEST_TRITON names no other triton")
@pytest.mark.parametrize("name", NEWEST)
@pytest.mark.parametrize("target", TARGETS)
def test_all_by_the_newest_triton(target: str, name: str) -> None:
    assert OTHER is not None
    check(target, name, NEWEST, ROOT / OTHER)


@pytest.mark.gpu_slow
@pytest.mark.parametrize(
    "folder", [None, *([ROOT / OTHER] if OTHER else [])], ids=lambda path: path and "newest"
)
@pytest.mark.parametrize("name", AHEAD)
def test_products_ahead_of_their_turn(name: str, folder: Path | None) -> None:
    """In the loop over whole tiles exponentials run beside products, and nothing is spilled for it."""
    records = compiled("sm90", tuple(AHEAD), folder)[name]
    if isinstance(records, Refused):
        pytest.fail(records, pytrace=False)
    record = records[0]
    assert not faults(record, AHEAD[name], TARGETS["sm90"], version_of(folder))
    assert min(record["exp2 beside no product"]) == 0 < max(record["exp2 beside no product"])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_are_of_what_ships(path: Path) -> None:
    """Every kernel of every job has a row, with the options that it is launched with."""
    table = read(path)
    names = {name for jobs in table.values() for name in jobs}
    options = shipped_options(path.stem.removeprefix(PREFIX))
    shipped = {at: records for at, records in options.items() if at[1] in names}
    assert names in (set(JOBS), set(NEWEST)) and set(table) == set(TARGETS)
    for (target, name), records in shipped.items():
        rows = [(record["kernel"], record["options"]) for record in table[target][name]]
        assert rows == [(record["kernel"], record["options"]) for record in records], (target, name)
