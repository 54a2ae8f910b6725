"""The examples in short form: a few steps, and what can be known of their results by then.

`make test-slow` runs them at full length and holds them to the accuracy that they promise.
"""

from __future__ import annotations

import datetime
import os
import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from examples import image, numpy_attention, translate

PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(path):
    return path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("example", [image, numpy_attention, translate], ids=lambda module: module.__name__)
def test_help(example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    assert example.__doc__.split("\n")[0][:40] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", [0, 1])
def test_numpy_attention(seed, tmp_path, capsys):
    assert numpy_attention.main(["--seed", str(seed), "--out", str(tmp_path)]) < 1e-13
    printed = capsys.readouterr().out
    assert printed.count("equal, at most") == 5
    assert is_picture(tmp_path / "numpy_attention.png")


def test_numpy_attention_prints_what_it_computes(capsys):
    """The first Z, computed once more from the numbers on the screen."""
    numpy_attention.main([])
    lines = capsys.readouterr().out.split("Z1 =")[0].splitlines()
    rows = [np.array(line.split("[")[1].split("]")[0].split(), float) for line in lines if "[" in line]
    words, query_map, key_map, value_map = rows[:2], rows[2:6], rows[6:10], rows[10:14]
    query, key, value = (np.stack(words) @ np.stack(part) for part in (query_map, key_map, value_map))
    powers = np.exp(query[0] @ key.T / np.sqrt(3))
    expected = powers @ value / powers.sum()
    numpy_attention.main([])
    z1 = re.search(r"Z1 = .*\[(.*)\]", capsys.readouterr().out)
    np.testing.assert_allclose(np.array(z1[1].split(), float), expected, atol=0.006)


def test_image(tmp_path, capsys):
    accuracy = image.main(["--steps", "120", "--out", str(tmp_path)])
    assert accuracy > 0.5  # of ten digits: what needs attention and positions to be there at all
    assert is_picture(tmp_path / "image.png")


@pytest.mark.slow
def test_image_whole(tmp_path):
    assert image.main(["--out", str(tmp_path)]) > 0.95


def test_image_test_set_is_apart():
    images, labels, test_images, test_labels = image.digits(0)
    assert len(images) + len(test_images) == 1797
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    flat, test_flat = images.flatten(1), test_images.flatten(1)
    assert torch.cdist(flat, test_flat).min() > 0


def test_written_dates():
    """Whatever form is chosen, each part is there, and the day is the day of the week."""
    rng = random.Random(0)
    date = datetime.date(1984, 3, 23)
    forms = {translate.written(date, rng) for _ in range(300)}
    assert {"23 march 1984", "friday, the twenty-third of mar, 1984", "fri march 23rd, 1984"} <= forms
    assert all(
        "1984" in form and "mar" in form and ("23" in form or "twenty-third" in form) for form in forms
    )
    for day, word in (
        (1, "1st"),
        (2, "2nd"),
        (3, "3rd"),
        (11, "11th"),
        (12, "12th"),
        (22, "22nd"),
        (31, "31st"),
    ):
        forms = {translate.written(date.replace(day=day), rng) for _ in range(100)}
        assert any(f"{word} " in form or f"{word}," in form for form in forms)
    held_out = translate.split(rng)
    assert not set(held_out[0]) & set(held_out[1])


def test_translate(tmp_path, capsys):
    """Step by step with caches the decoder writes what it writes in one go without."""
    translate.main(["--steps", "30", "--out", str(tmp_path), "--text", "3 mar 1984"])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.7 * losses[0]
    assert is_picture(tmp_path / "translate.png")


@torch.no_grad()
def test_translate_with_caches_as_without():
    torch.manual_seed(0)
    model = translate.Translator().eval()
    texts = ["3 mar 1984", "friday, the twenty-third of march, 2001"]
    originals, lengths = translate.encode(texts)
    memory = model.read(originals)
    codes = torch.full((2, 1), translate.START)
    for _ in range(translate.TARGET_LENGTH):
        best = model.write(codes, memory, lengths)[:, -1:].argmax(-1)
        codes = torch.cat([codes, best], dim=1)
    assert model.translate(texts) == [translate.decode(row) for row in codes[:, 1:]]
    # Padding says nothing: the short text alone is written as in the batch.
    assert model.translate(texts[:1]) == model.translate(texts)[:1]


@pytest.mark.slow
def test_translate_whole(tmp_path):
    assert translate.main(["--out", str(tmp_path)]) > 0.95


def test_translate_says_what_it_cannot_read(capsys):
    with pytest.raises(SystemExit, match="2"):
        translate.main(["--text", "3/3/1984"])
    assert "got '3/3/1984'" in capsys.readouterr().err
