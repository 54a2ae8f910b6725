"""The faults of `make test-faults` still fit the sources, and docs/testing.md lists them."""

from __future__ import annotations

import re

import pytest

from build_tree import ROOT
from faults import FAULTS, Fault
from faults_gpu import GPU_FAULTS
from plant_faults import planted


@pytest.mark.parametrize("fault", [*FAULTS, *GPU_FAULTS], ids=lambda fault: fault.name)
def test_fits_the_source(fault: Fault) -> None:
    assert planted(fault) != (ROOT / fault.file).read_text()
    assert all((ROOT / file).exists() for file in fault.files())


def test_documented() -> None:
    table = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/testing.md").read_text(), re.MULTILINE)
    assert table == [fault.name for fault in (*FAULTS, *GPU_FAULTS)]
