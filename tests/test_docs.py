"""The documents are true: their code runs, their links lead somewhere, their names exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import _core

pytest.importorskip("matplotlib")
import pictures

ROOT = Path(__file__).resolve().parent.parent
DRAWN = ROOT / "docs" / "_pictures"
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
        if not torch.cuda.is_available():
            block = block.replace('device="cuda"', 'device="cpu"')
        exec(compile(block, f"{path.name} block {number}", "exec"), namespace)


PACKAGE = ROOT / "python"
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def what_the_reader_has(module: str, folder: Path) -> dict[str, Any]:
    """What the examples of a module leave to the reader: a model, its name, and what goes into it."""
    if module not in (
        "fastattn.viz.recording",
        *(f"fastattn.integrations.transformers{end}" for end in ("", "_cache")),
    ):
        return {}
    transformers = pytest.importorskip("transformers", minversion="4.57")
    sizes = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=12)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokens = list("attention")
    return {
        "model": model,
        "name": str(folder),
        "tokens": tokens,
        "inputs": {"input_ids": torch.arange(9)[None]},
    }


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=document_id)
def test_examples_of_docstrings_print_what_they_say(path: Path, tmp_path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    given = what_the_reader_has(name, tmp_path)
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), extraglobs=given)
    runner = doctest.DocTestRunner()
    for examples in found:
        runner.run(examples)
    attempted = runner.summarize(verbose=False)
    assert attempted == (0, path.read_text().count(">>> "))


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text())
    drawn = {DRAWN / f"{name}.svg" for name in pictures.all_pictures()}
    places = {target: (path.parent / target).resolve() for target in targets}
    assert not [target for target, place in places.items() if place not in drawn and not place.exists()]


def test_every_picture_is_shown() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert [name for name in pictures.all_pictures() if f"_pictures/{name}.svg" not in text] == []


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if ROOT / "docs" in p.parents], ids=document_id)
def test_every_page_is_in_a_table_of_contents(path: Path) -> None:
    """The site warns of pages that nothing leads to, but only when it is built."""
    name = path.relative_to(ROOT / "docs").with_suffix("")
    if str(name) == "index" or name.parent.name == "decisions":  # all of that folder are
        return
    listed = set()
    for other in (ROOT / "docs").rglob("*.md"):
        for lines in re.findall(r"^```{toctree}\n(.*?)^```", other.read_text(), re.DOTALL | re.MULTILINE):
            entries = (line for line in lines.split() if not line.startswith(":"))
            listed |= {(other.parent / entry).resolve() for entry in entries}
    assert (ROOT / "docs" / name) in listed


PUBLIC = (
    "fastattn", "fastattn.nn", "fastattn.ops", "fastattn.viz", "fastattn.compare",
    "fastattn.integrations.transformers", "fastattn.integrations.flash_attn",
)  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """A whole module is shown by `automodule`, but for names that stand elsewhere on the same page."""
    pytest.importorskip("transformers" if module.endswith("transformers") else "numpy")
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    whole = re.search(rf"^\.\. automodule:: {re.escape(module)}\n((?:   .*\n)*)", text, re.MULTILINE)
    assert whole is not None
    left_out = set(re.findall(r"\w+", whole[1].partition(":exclude-members:")[2]))
    alone = set(re.findall(rf"^\.\. auto\w+:: {re.escape(module)}\.(\w+)$", text, re.MULTILINE))
    assert left_out <= names and left_out == alone & names


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
