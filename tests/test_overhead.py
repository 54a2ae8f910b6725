"""``python -m bench.overhead``: the table of docs/compile.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import overhead

GUIDE = Path(__file__).resolve().parent.parent / "docs/compile.md"


def test_every_row_is_timed_and_in_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = overhead.actions()
    assert all(name.strip() in printed for name in rows)
    table = GUIDE.read_text().split("| | best | median |")[1].split("\n\n")[0]
    shown = [re.sub(r"[*`]", "", row.split("|")[1]).strip() for row in table.strip().splitlines()[1:]]
    assert shown == [name.strip() for name in rows if ".backward(g)" not in name]
