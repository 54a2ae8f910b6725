"""The commands that documents show: run where that takes a moment, otherwise read by what would run them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from typer.testing import CliRunner

from fastattn import _config
from fastattn.cli import app
from test_docs import DOCUMENTS, ROOT, document_id

BLOCK = re.compile(r"^ *```(\S*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
EXTRAS = set(importlib.metadata.metadata("fastattn").get_all("Provides-Extra"))
MODELS = (ROOT / "python/fastattn/demo/models.txt").read_text().split()
# Results of these names need not be there: somebody's own.
RESULT = re.compile(r"([a-z]+)-\d{8}-\d{6}")
# Commands that begin so are run; those of some seconds and more in `make test-slow`.
MOMENTS = ("fastattn --help", "fastattn info", "fastattn explain", "python examples/numpy_attention.py")
LONGER = ("fastattn compare --part", "fastattn view --text The", "python examples/word_links.py")
PROGRAMS = "build/cpp/tests/cpp/"
# Blocks without a language: what checks them.
PLAIN = {
    "ARCHITECTURE.md": "test_architecture.py",
    "docs/command-line.md": "test_explain_prints_what_is_shown",
    "docs/decisions/0018-products-ahead.md": "nothing: instructions of binaries before and after",
    "examples/README.md": "nothing: what a model wrote that was trained for minutes",
}

Words = list[str]  # of one command


def blocks(path: Path, language: str) -> list[str]:
    return [block for kind, block in BLOCK.findall(path.read_text()) if kind == language]


def commands() -> list[Words]:
    """Each once, without comments."""
    lines = "".join(block for path in DOCUMENTS for block in blocks(path, "sh")).split("\n")
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for number, words in enumerate(found) if words and words not in found[:number]]


def starting(beginnings: tuple[str, ...]) -> list[Words]:
    return [words for words in commands() if " ".join(words).startswith(beginnings)]


class UnderstoodError(Exception):
    """A program has read its arguments, and goes no further."""


def program(words: Words, run: bool) -> None:
    """``python FILE`` or ``python -m MODULE``, in this process: its parser takes the arguments."""
    with pytest.MonkeyPatch.context() as patch:
        if not run:
            parse = argparse.ArgumentParser.parse_args

            def stop(parser: argparse.ArgumentParser, *given: object) -> None:
                parse(parser, *given)
                raise UnderstoodError

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        as_module = words[1] == "-m"
        patch.setattr(sys, "argv", words[1 + as_module :])
        try:
            if as_module:
                for name in (words[2], f"{words[2]}.__main__"):
                    patch.delitem(sys.modules, name, raising=False)
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except UnderstoodError:
            pass
        except SystemExit as end:
            assert not end.code, f"{words} ended with {end.code}"


def bench(words: Words, run: bool) -> None:
    """``python -m bench``: every name of a suite, case, peer and result, too."""
    from bench.__main__ import choose_peers, parser
    from bench.suites import SUITES, select

    what, *given = words[3:]
    kinds = {match[1] for word in given if (match := RESULT.fullmatch(word))}
    assert kinds <= {*SUITES, "variants", "generation"}
    if what in ("plot", "report"):  # which take results alone
        assert all(map(RESULT.fullmatch, given))
    elif what in ("compare", "figures", "variants", "insight"):
        program(words, run)
    else:
        options = parser().parse_args([what, *given])
        assert select(options.suite, options.cases, options.dtype) and choose_peers(what, options.peers)


def fastattn(words: Words, run: bool) -> str:
    """``fastattn``: its own parser takes the arguments."""
    if run:
        result = CliRunner().invoke(app(), words[1:])
        assert result.exit_code == 0, result.output
        return result.stdout
    group = typer.main.get_command(app())
    if words[1].startswith("-"):
        assert words[1] in {name for option in group.params for name in option.opts}
    else:
        group.commands[words[1]].make_context(words[1], words[2:])
    return ""


def make(words: Words, run: bool) -> None:
    """``make``: a target that there is, and variables that the Makefile reads."""
    text = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, assigned, _ = word.partition("=")
        assert re.search(rf"\$\((?:or \$\()?{name}\b" if assigned else rf"^{name}:", text, re.MULTILINE), word
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip_install(words: Words, run: bool) -> None:
    """``pip install``: this folder with extras that there are, or the models."""
    for word in words[2:]:
        if extras := re.fullmatch(r"\.(?:\[(.+)\])?", word):
            assert set((extras[1] or "all").split(",")) <= EXTRAS, word
        else:
            assert word in ("--no-deps", *MODELS), word


def python_code(words: Words, run: bool) -> None:
    """``python -c``: what Python can compile."""
    compile(words[2], "<command>", "exec")


def pytest_of(words: Words, run: bool) -> None:
    """``python -m pytest``: files and folders that there are."""
    assert (ROOT / words[3]).exists(), words[3]


def cmake(words: Words, run: bool) -> None:
    """``cmake``, or a program that it makes: options and programs of the CMakeLists."""
    options = re.findall(r"^option\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    programs = re.findall(
        r"^add_executable\((\w+)", (ROOT / "tests/cpp/CMakeLists.txt").read_text(), re.MULTILINE
    )
    assert {word[2:].split("=")[0] for word in words if word.startswith("-D")} <= set(options)
    named = [words[words.index("--target") + 1]] if "--target" in words else []
    named += [words[0].removeprefix(PROGRAMS)] if words[0] != "cmake" else []
    assert set(named) <= set(programs)


RULES: dict[str, Callable[[Words, bool], str | None]] = {
    "fastattn": fastattn,
    "make": make,
    "pip install": pip_install,
    "python -m bench": bench,
    "python -m pytest": pytest_of,
    "python -c": python_code,
    "python": program,
    "cmake": cmake,
    f"{PROGRAMS}exp2_test": cmake,
}


def part(words: Words, sign: str) -> tuple[Words, Words]:
    """What is before a sign, and what behind it."""
    place = words.index(sign) if sign in words else len(words)
    return words[:place], words[place + 1 :]


def check(words: Words, run: bool) -> None:
    """By the rule with the longest name that it begins with; what comes behind a pipe is a field of JSON."""
    words, others = part(words, "&&")
    if others:
        check(others, run)
    words, piped = part(words, "|")
    words, _ = part(part(words, ">")[0], "<")
    while "=" in words[0]:
        assert words.pop(0).split("=")[0] in _config.VARIABLES
    fitting = [name for name in RULES if words[: len(name.split())] == name.split()]
    assert fitting, f"no rule for: {shlex.join(words)}"
    printed = RULES[max(fitting, key=len)](words, run)
    if piped:
        jq, field = piped
        assert jq == "jq" and json.loads(printed or "")[field.removeprefix(".")]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_commands_run_or_are_understood(words: Words) -> None:
    check(words, run=words in starting(MOMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("words", starting(LONGER), ids=shlex.join)
def test_longer_commands_run(words: Words) -> None:
    check(words, run=True)


def test_explain_prints_what_is_shown() -> None:
    """But for what depends on the machine."""
    (shown,) = blocks(ROOT / "docs/command-line.md", "")
    (command,) = (words for words in starting(("fastattn explain",)) if "--kv-heads" in words)
    there, here = (
        re.findall(r"^(?!isa|path|threads|not triton)(.+?) *$", text, re.MULTILINE)
        for text in (fastattn(command, run=True), shown)
    )
    assert here == there


def test_every_block_is_fenced_and_has_a_rule() -> None:
    for path in DOCUMENTS:
        unfenced = BLOCK.sub("", path.read_text())
        assert re.findall(r"^\n {4}.*", unfenced, re.MULTILINE) == [], path
    kinds = {kind for path in DOCUMENTS for kind, _ in BLOCK.findall(path.read_text())}
    assert kinds <= {"python", "{toctree}", "sh", ""}  # the first two by test_docs.py
    assert {document_id(path) for path in DOCUMENTS if blocks(path, "")} == set(PLAIN)


def test_named_extras_exist() -> None:
    for path in DOCUMENTS:
        for extras in re.findall(r"(?:fastattn|\.)\[([a-z,]+)\]'", path.read_text()):
            assert set(extras.split(",")) <= EXTRAS, path


@pytest.mark.parametrize(
    "command",
    [
        "fastattn info --jason",
        "fastattn show",
        "fastattn --completion",
        "fastattn info --json | jq .cores",
        "make tests",
        "make test ARG=-x",
        "pip install '.[everything]'",
        "pip install numpy",
        "python -m bench mask",
        "python -m bench masks --peers numpy",
        "python -m bench plot masks",
        "python -m bench variants --parts orders",
        "python -m bench.overheads",
        "python examples/numpy_attention.py --word it",
        "python examples/pictures.py",
        "cmake -S . -DFASTATTN_TEST=ON",
        "cmake --build build/cpp --target exp",
        "FASTATTN_ISAS=avx2 fastattn info",
        "fastattn info && fastattn infos",
        "python -m pytest tests/nothing",
        "python -c 'import'",
        "pytest tests",
    ],
)
def test_what_is_wrong_is_noticed(command: str) -> None:
    words = shlex.split(command)
    with pytest.raises((Exception, SystemExit)):
        check(words, run="jq" in words)
