"""The documents are true: their code runs, their links lead somewhere, their names exist."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

import fastattn
from fastattn import _core

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if python_blocks(p)], ids=document_id)
def test_code_blocks_run(path: Path) -> None:
    """The blocks of one document run in order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(path), 1):
        exec(compile(block, f"{path.name} block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_named_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9-]+)", path.read_text())) <= targets


def test_one_version_number() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    changelog = re.search(r"^## \[?(\d[^\] ]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changelog is not None
    versions = {fastattn.__version__, _core.__version__, importlib.metadata.version("fastattn"), changelog[1]}
    assert versions == {declared[1]}


def variables_read() -> set[str]:
    """FASTATTN_* names that the package reads: string literals in Python, getenv in C++."""
    names: set[str] = set()
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.update(re.findall(r"\AFASTATTN_[A-Z_]+\Z", node.value))
    for path in (ROOT / "csrc").rglob("*.cpp"):
        names.update(re.findall(r'getenv\("(FASTATTN_[A-Z_]+)"\)', path.read_text()))
    return names


def test_environment_variables_are_documented_and_real() -> None:
    table = (ROOT / "docs/env-vars.md").read_text()
    documented = re.findall(r"^\| `(FASTATTN_[A-Z_]+)`", table, re.MULTILINE)
    assert sorted(documented) == sorted(variables_read())


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "docs/env-vars.md"])
def test_every_tier_is_documented(name: str) -> None:
    text = (ROOT / name).read_text()
    assert [isa for isa in _core.compiled_isas() if f"`{isa}`" not in text] == []


def test_every_decision_keeps_the_form() -> None:
    for path in sorted((ROOT / "docs/decisions").glob("*.md")):
        number = int(path.name[:4])
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        assert headings[0].startswith(f"{number}. "), path.name
        assert headings[1:] == ["Context", "Decision", "Consequences"], path.name
        assert re.search(r"^Status: ", path.read_text(), re.MULTILINE), path.name
