"""Generation with each implementation's cache, as demo and benchmark do it, and what they make of it."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")

import torch
import transformers
from rich.console import Console

from bench import figures
from bench import generation as measured
from bench.results import Run
from fastattn.demo import generation
from fastattn.integrations.transformers import register

MADE = generation.Generation(
    [5, 6, 7], [1.0, 1e-5, 1.0], 2.0, 1.0, [0.5, 0.1, 0.4], [0.2, 0.05, 0.3], [40.0, 50.0, 20.0]
)


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    register()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_tokens_are_those_of_eager(model: transformers.PreTrainedModel) -> None:
    """And what is timed is timed: a prompt, and all tokens but the first."""
    ids = torch.randint(64, (1, 70))
    made = {
        name: generation.generate(model, ids, name, 9, measure=lambda: 2.0)
        for name in generation.IMPLEMENTATIONS
    }
    for name, one in made.items():
        assert generation.agrees(one, made["eager"]), name
        assert (len(one.tokens), len(one.steps), one.beside) == (9, 8, [2.0] * 8)
        assert one.prefill > 0 and min(one.steps) > 0
        parts = zip(one.attention, one.steps, strict=True)
        assert all((0 < part < whole) == (name != "eager") for part, whole in parts)


def test_a_token_may_differ_only_at_a_tie() -> None:
    other = dataclasses.replace(MADE, tokens=[5, 8, 9])
    assert generation.agrees(other, MADE)  # at the second, two logits are as good as equal
    assert not generation.agrees(other, dataclasses.replace(MADE, margins=[1.0, 1.0, 1.0]))
    assert not generation.agrees(dataclasses.replace(MADE, tokens=[4, 6, 7]), MADE)
    assert MADE.step == 0.4


def test_the_demo_tells_where_tokens_differ(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compares those of each implementation, at each length, and shows what it measured."""
    ids = torch.randint(64, (1, 90))
    tokenizer = lambda *_, **__: SimpleNamespace(input_ids=ids)  # noqa: E731
    monkeypatch.setattr(generation, "LENGTHS", (20, 90))
    console = Console(file=io.StringIO(), width=120)
    assert generation.compare_generation(model, tokenizer, console)
    text = console.file.getvalue()
    assert [text.count(f"{length} tokens") for length in (20, 90)] == [1, 1] and "others" not in text
    assert text.count("as eager's") == 4

    real = generation.generate

    def wrong(
        model: Any, ids: torch.Tensor, name: str, *tokens: int, **options: Any
    ) -> generation.Generation:
        made = real(model, ids, name, *tokens, **options)
        margins = [1.0] * len(made.tokens)
        changed = [made.tokens[0], -1, *made.tokens[2:]] if name == "fastattn" else made.tokens
        return dataclasses.replace(made, tokens=changed, margins=margins)

    monkeypatch.setattr(generation, "generate", wrong)
    assert not generation.compare_generation(model, tokenizer, console)
    assert console.file.getvalue().count("others") == 2


def test_the_table_of_the_demo() -> None:
    slow = dataclasses.replace(MADE, prefill=4.0, steps=[0.8], attention=[0.6])
    text = io.StringIO()
    Console(file=text, width=120).print(
        generation.table({500: {"eager": (slow, math.nan), "sdpa": (slow, 200.0), "fastattn": (MADE, 100.0)}})
    )
    rows = [line.strip("│").split("│") for line in text.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:]] for row in rows[:5]] == [
        ["prompt, tokens a second", "125", "125", "250", "2.00x"],
        ["its attention, ms", "1000", "1000", "1000", "1.00x"],
        ["then, tokens a second", "1.2", "1.2", "2.5", "2.00x"],
        ["attention of one, ms", "600", "600", "200", "3.00x"],
        ["memory at most, MiB", "-", "200", "100", "2.00x"],
    ]


def test_the_table_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    machine = {"cpu": "x Processor", "isa": "y"}
    run = Run("generation", "2026-01-01T00:00:00+00:00", machine, {"transformers": "5"}, {}, 2, 0.0)
    rows = []
    for name in measured.IMPLEMENTATIONS:
        made = dataclasses.asdict(MADE) | ({"tokens": [5, 6, 8]} if name == "sdpa" else {})
        for length in (32, 8000):
            rows.append(measured.Row(name, "float32", length, made, 99.6, 4_000_000_000, 40.0))
    path = measured.save(run, rows, tmp_path / "generation-1.json")
    assert measured.load([str(path)]) == (rows, run)
    text = "a\n<!-- table: generation -->\nold\n<!-- /table -->\nb\n"
    made = figures.rewrite(text, [str(path)])
    assert "old" not in made and made.startswith(
        "a\n<!-- table: generation-1 -->\n`python -m bench.generation`"
    )
    assert "| float32, 8000 tokens | 4000 / 2.5 / 100 | 4000 / 2.5 / 100 | 4000 / 2.5 / 100 | 1.00x |" in made
    assert "attention takes 50% of the time in float32, 1.50 times that of reading its keys" in made
    assert "values once at 40 GB/s" in made
    assert "In float32 6 of 6 greedy tokens are eager's." in made
    measured.draw(rows, run, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
