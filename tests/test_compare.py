"""Attention beside recurrent networks: counts, tasks, records, and training in short form."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import fastattn
from fastattn import compare
from fastattn.compare import pictures, tables, tasks, training
from fastattn.compare.cost import Cost, CostSettings, Memory, Timing
from fastattn.compare.layers import ATTENTION, KINDS, make_layer, visible_pairs
from fastattn.compare.memory import peak_bytes
from fastattn.compare.order import Order, Ordered, OrderSettings
from fastattn.compare.recall import Recall, Recalled, RecallSettings


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_weights_and_of_what_is_seen(kind: str) -> None:
    length, width, window = 23, 16, 5
    layer = make_layer(kind, width, heads=2, window=window)
    products = 2 * length * sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    seen = 0
    if kind in ATTENTION:
        _, weights = layer(torch.randn(1, length, width), need_weights=True)
        assert (weights > 0).sum(dim=(0, 2, 3)).unique().numel() == 1  # both heads see the same pairs
        seen = int((weights[0, 0] > 0).sum())
    assert visible_pairs(kind, length, window) == seen
    assert compare.count_flops(kind, length, width, window=window) == products + 4 * width * seen
    # In training a linear map is two more products, and attention 2 of its own there and 5 back.
    expected = 3 * products + 14 * width * seen
    assert compare.count_flops(kind, length, width, window=window, training=True) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_layers_return_what_they_are_told_to(kind: str) -> None:
    x = torch.randn(2, 9, 16, requires_grad=True)
    layer = make_layer(kind, 16, heads=2, window=3)
    out = layer(x)
    assert out.shape == x.shape
    (reach,) = torch.autograd.grad(out[0, 4].sum(), x)
    rows = reach[0].abs().sum(dim=-1).nonzero().flatten().tolist()
    assert rows == {"full": list(range(9)), "window": [2, 3, 4]}.get(kind, [0, 1, 2, 3, 4])
    assert not reach[1].any()


def test_wrong_names_list_the_right_ones() -> None:
    with pytest.raises(ValueError, match="full, causal, window, rnn, gru, lstm, got 'mamba'"):
        make_layer("mamba", 16)
    with pytest.raises(ValueError, match="got 'mamba'"):
        CostSettings(kinds=("mamba",))
    with pytest.raises(ValueError, match="position must be None for 'gru'"):
        make_layer("gru", 16, position="rotary")
    with pytest.raises(ValueError, match=r"none, sinusoidal, .*, got 'roman'"):
        training.Reader("full", 16, position="roman")
    with pytest.raises(ValueError, match="distance must be at least 1, got 0"):
        tasks.recall_batch(1, 0, torch.Generator())
    with pytest.raises(ValueError, match="length must be at least 3, got 2"):
        tasks.order_batch(1, 2, torch.Generator())


def marked_in(sequence: list[int]) -> list[tuple[int, int]]:
    """Where marked symbols stand, and which."""
    return [(at, token - 10) for at, token in enumerate(sequence) if 10 <= token < 20]


@pytest.mark.parametrize("distance", [1, 2, 30])
def test_recall_asks_for_the_one_marked_symbol(distance: int) -> None:
    tokens, answers = tasks.recall_batch(500, distance, torch.Generator().manual_seed(1))
    assert tokens.shape == (500, distance + 1)
    for sequence, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert marked_in(sequence) == [(0, answer)]
        assert sequence[-1] == 20 and 20 not in sequence[:-1]
    assert set(answers.tolist()) == set(range(10))


@pytest.mark.parametrize("length", [3, 4, 32])
def test_order_asks_for_the_first_of_two(length: int) -> None:
    tokens, answers = tasks.order_batch(500, length, torch.Generator().manual_seed(1))
    assert tokens.shape == (500, length)
    places = set()
    for sequence, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        (first, symbol), (second, other) = marked_in(sequence)
        assert symbol == answer != other
        assert sequence[-1] == 20 and 20 not in sequence[:-1]
        places |= {first, second}
    assert places == set(range(length - 1))


@pytest.mark.parametrize("position", training.POSITIONS)
def test_only_positions_tell_the_first_from_the_second(position: str) -> None:
    """Swap the two marked symbols: without positions the answer stays, and is right in half of the cases."""
    torch.manual_seed(0)
    model = training.Reader("full", 48, position=position, length=32)
    tokens, _ = tasks.order_batch(64, 32, torch.Generator().manual_seed(0))
    swapped = tokens.clone()
    for row in swapped:
        marked = ((row >= 10) & (row < 20)).nonzero().flatten()
        row[marked] = row[marked.flip(0)]
    with torch.inference_mode():
        change = (model(tokens) - model(swapped)).abs().max()
    assert change < 1e-5 if position == "none" else change > 1e-4


def test_attention_learns_the_order_with_positions_and_not_without() -> None:
    settings = OrderSettings(positions=("none", "sinusoidal"), length=12, steps=120, checks=2)
    told: list[tuple[int, int, str]] = []
    order = compare.measure_order(settings, lambda *heard: told.append(heard))
    without, with_ = order.results
    assert 0.4 < without.accuracy < 0.6
    assert with_.accuracy > 0.85
    assert [steps for steps, _ in with_.curve] == [60, 120]
    assert told == [(0, 2, "positions: none"), (1, 2, "positions: sinusoidal")]


def test_attention_recalls_what_its_window_reaches() -> None:
    settings = RecallSettings(kinds=("full", "window"), distances=(5, 12), window=8, steps=80)
    recall = compare.measure_recall(settings)
    assert recall.accuracy("full") == {5: 1.0, 12: 1.0}
    assert recall.accuracy("window")[5] == 1.0
    assert recall.accuracy("window")[12] < 0.25


def test_training_starts_from_the_seed_and_leaves_the_generator_alone() -> None:
    settings = RecallSettings(kinds=("gru",), distances=(3,), steps=3)
    before = torch.random.get_rng_state()
    first = compare.measure_recall(settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert compare.measure_recall(settings) == first
    assert compare.measure_recall(dataclasses.replace(settings, seed=1)) != first


def test_networks_have_the_same_number_of_parameters() -> None:
    budget = training.parameters(training.Reader("full", 48))
    for kind in KINDS:
        width = training.matched_width(kind, 48)
        assert abs(training.parameters(training.Reader(kind, width)) / budget - 1) < 0.03, kind


def a_cost() -> Cost:
    """Attention takes the square of the length in microseconds, a recurrent network 100 times the length."""
    settings = CostSettings(kinds=("full", "lstm"), lengths=(16, 64, 256), memory_lengths=(64, 256))
    cost = Cost(settings, peaks=[50.0, 100.0])
    for length in settings.lengths:
        for kind, scale in (("full", length), ("lstm", 100)):
            for mode in (False, True):
                for threads in settings.threads:
                    seconds = 1e-6 * length * scale / threads
                    flops = compare.count_flops(kind, length, settings.width, training=mode)
                    cost.timings.append(Timing(kind, length, mode, threads, seconds, 3, flops))
    cost.memory += [
        Memory("full", length, mode, 4096 * length) for length in (64, 256) for mode in (False, True)
    ]
    return cost


def test_lines_meet_where_they_do() -> None:
    cost = a_cost()
    assert cost.crossing("full", "lstm", False, 2) == pytest.approx(100)
    assert cost.crossing("lstm", "full", False, 2) == math.inf
    slower = Cost(cost.settings, cost.peaks, [t for t in cost.timings if t.length > 100])
    assert slower.crossing("full", "lstm", True, 1) == 0
    assert cost.speedup("full", True) == {16: 2.0, 64: 2.0, 256: 2.0}


def test_operations_meet_where_the_counts_say() -> None:
    """4 L**2 W + 8 L W**2 against 12 or 16 L W**2; causal attention sees half of the pairs."""
    cost = Cost(CostSettings(width=64, window=64))
    assert cost.crossing_of_flops("full", "rnn", False) == 0
    assert cost.crossing_of_flops("full", "gru", False) == 64
    assert cost.crossing_of_flops("full", "lstm", False) == 128
    assert cost.crossing_of_flops("causal", "lstm", False) == 255
    assert cost.crossing_of_flops("window", "lstm", False) == math.inf


def test_costs_are_measured() -> None:
    settings = CostSettings(
        kinds=("window", "rnn"),
        lengths=(16, 32),
        memory_lengths=(),
        threads=(1,),
        width=32,
        seconds=1e-3,
        rounds=2,
    )
    threads, told = (torch.get_num_threads(), fastattn.get_num_threads()), []
    cost = compare.measure_cost(settings, lambda *heard: told.append(heard))
    assert (torch.get_num_threads(), fastattn.get_num_threads()) == threads
    assert len(cost.timings) == 8 and len(told) == 16 and {total for _, total, _ in told} == {16}
    assert all(t.seconds > 0 and t.calls >= 2 for t in cost.timings)
    assert cost.seconds("rnn", True, 1).keys() == {16, 32}
    assert cost.peaks[0] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads how large a process has been from /proc")
def test_memory_is_what_the_call_holds_and_no_scores() -> None:
    length, width, heads = 4096, 64, 4
    peak = peak_bytes("full", length, False, threads=1, width=width, heads=heads, window=64)
    assert peak is not None
    rows, scores = 4 * length * width, 4 * heads * length**2
    assert 4 * rows <= peak < scores / 8  # query, key, value and result at the least
    with pytest.raises(RuntimeError, match="memory of 'full' at 64 rows failed: ValueError: embed_dim"):
        peak_bytes("full", 64, False, threads=1, width=width, heads=5, window=64)


RESULTS = (
    a_cost(),
    Recall(RecallSettings(kinds=("full", "rnn"), distances=(5, 50)), results=[
        Recalled(kind, distance, 48, 10906, 1.0 if kind == "full" else 5 / distance)
        for kind in ("full", "rnn") for distance in (5, 50)
    ]),
    Order(OrderSettings(positions=("none", "rotary"), steps=20), results=[
        Ordered("none", 10906, ((10, 0.5), (20, 0.51))), Ordered("rotary", 10906, ((10, 0.7), (20, 0.99))),
    ]),
)  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_results_survive_json(result: Cost | Recall | Order) -> None:
    kept = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert type(result).from_dict(kept) == result


def test_tables_say_what_was_measured() -> None:
    cost, recall, order = RESULTS
    assert tables.crossings(cost).rows[0] == ["full, forward, 1 thread", "100 (512)"]
    assert tables.times(cost).rows[0] == ["full, forward", "0.13 (2.0x)", "2.0 (2.0x)", "32.8 (2.0x)"]
    alone = dataclasses.replace(cost, settings=dataclasses.replace(cost.settings, threads=(1,)))
    assert tables.times(alone).rows[0] == ["full, forward", "0.26", "4.1", "65.5"]
    assert tables.memory(cost).rows[:2] == [["full, forward", "0.2", "1.0"], ["lstm, forward", "", ""]]
    assert tables.recall(recall).markdown() == (
        "|  | 5 | 50 |\n| --- | --: | --: |\n| full | 100% | 100% |\n| rnn | 100% | 10% |\n"
    )
    assert tables.order(order).rows == [["none", "10906", "51.0%"], ["rotary", "10906", "99.0%"]]


def test_pictures_have_the_lines_and_say_which(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cost, recall, order = RESULTS
    times = pictures.draw_times(cost)
    forward, _ = times.axes
    assert [text.get_text() for text in forward.texts] == [
        "full attention meets\nLSTM 100"
    ]  # where the lines meet
    measured = forward.lines[0]
    assert list(measured.get_xdata()) == [16, 64, 256]
    assert list(measured.get_ydata()) == pytest.approx([0.128, 2.048, 32.768])
    floor = forward.lines[1]
    assert floor.get_ydata()[0] == pytest.approx(compare.count_flops("full", 16, 256) / 100e9 * 1e3)
    legend = [text.get_text() for text in times.legends[0].get_texts()]
    assert legend[:2] == ["full attention", "LSTM"]
    assert "RoPE: 99%" in [text.get_text() for text in pictures.draw_order(order).legends[0].get_texts()]
    for name, figure in {
        "times": times,
        "memory": pictures.draw_memory(cost),
        "speedup": pictures.draw_speedup(cost),
        "recall": pictures.draw_recall(recall),
    }.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)
        assert (tmp_path / f"{name}.png").stat().st_size > 2000


@pytest.mark.parametrize("lengths", [(64, 256), (256,)])
def test_the_picture_of_memory_shows_all_of_it(lengths: tuple[int, ...]) -> None:
    """As lines, or of one length as bars that name their kind and have their number; no panel is cut."""
    pytest.importorskip("matplotlib")
    settings = CostSettings(kinds=("full", "causal", "rnn"), memory_lengths=lengths)
    cost = Cost(settings, peaks=[50.0, 100.0], memory=[
        Memory(kind, length, mode, 2**20 * (length + 5000 * (mode and kind == "rnn")))
        for kind in settings.kinds for length in lengths for mode in (False, True)
    ])  # fmt: skip
    (figure,) = (figure for name, figure in pictures.of_part("cost", cost) if name == "memory")
    figure.draw_without_rendering()
    forward, training = figure.axes
    for ax, most in ((forward, lengths[-1]), (training, lengths[-1] + 5000)):
        value = ax.yaxis if len(lengths) > 1 else ax.xaxis
        assert value.get_view_interval()[1] > 1.05 * most  # and the mark, or the number, that stands there
        assert all(ax.bbox.x0 <= text.get_window_extent().x1 <= ax.bbox.x1 for text in ax.texts)
    if len(lengths) == 1:
        assert [label.get_text() for label in forward.get_yticklabels()] == [
            "full attention",
            "causal attention",
            "RNN",
        ]
        assert [text.get_text() for text in training.texts] == ["256", "256", "5256"]


def test_memory_that_nobody_could_measure_is_not_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert "memory" not in dict(pictures.of_part("cost", dataclasses.replace(a_cost(), memory=[])))


def test_the_command_keeps_prints_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from rich.console import Console

    from bench import results, variants

    fakes = {
        name: (kind, settings, lambda *_, result=result: result)
        for (name, (kind, settings, _)), result in zip(variants.PARTS.items(), RESULTS, strict=True)
    }
    monkeypatch.setattr(variants, "PARTS", fakes)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    console = Console(width=170, record=True, file=io.StringIO())
    assert variants.main(["--quick"], console) == 0
    (path,) = tmp_path.glob("variants-*.json")
    kept = variants.Record.load(path)
    assert tuple(kept.parts.values()) == RESULTS
    assert kept.run.machine["isa"] and kept.run.versions["torch"] == torch.__version__
    assert len(list(tmp_path.glob("*.png"))) == 5
    alone = dataclasses.replace(RESULTS[0], settings=dataclasses.replace(RESULTS[0].settings, threads=(1,)))
    drawn = variants.draw(variants.Record(kept.run, {"cost": alone}), tmp_path / "alone")
    assert [path.name for path in drawn] == ["alone-times.png", "alone-memory.png"]
    said = console.export_text()
    assert "100 (512)" in said and "99.0%" in said

    text = "a\n<!-- table: recall -->\nold\n<!-- /table -->\nb\n"
    only = variants.Record(kept.run, {"recall": kept.parts["recall"]})
    new = variants.rewrite(text, {path.stem: only})
    assert f"<!-- table: recall {path.stem} -->" in new and "| rnn | 100% | 10% |" in new and "old" not in new
    assert variants.rewrite(new, {path.stem: only}) == new and variants.places(new) == [path.stem]
    with pytest.raises(ValueError, match=r"no table 'times' in compare\.md"):
        variants.rewrite(text, {path.stem: kept})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a result of 'variants'"):
        variants.Record.load(tmp_path / "other.json")


def test_tables_of_the_document_are_those_of_the_results_kept() -> None:
    pytest.importorskip("rich")
    from bench import variants
    from bench.results import find

    text = variants.DOCUMENT.read_text()
    named = {name: variants.Record.load(find(name)) for name in variants.places(text)}
    assert {part for record in named.values() for part in record.parts} == set(variants.PARTS)
    assert variants.rewrite(text, named) == text
