"""The examples in short form: a few steps, and what can be known of their results by then.

`make test-slow` runs them at full length and holds them to the accuracy that they promise.
"""

from __future__ import annotations

import datetime
import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

pytest.importorskip("transformers")

import transformers

from examples import image, language_model, numpy_attention, translate, word_links

EXAMPLES = [image, language_model, numpy_attention, translate, word_links]

PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(path):
    return path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda module: module.__name__)
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
    accuracy = image.main(["--steps", "100", "--out", str(tmp_path)])
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


def test_translate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(translate, "HELD_OUT", 100)
    translate.main(["--steps", "30", "--out", str(tmp_path), "--text", "3 mar 1984"])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.7 * losses[0]
    assert is_picture(tmp_path / "translate.png")


@torch.no_grad()
def test_translate_with_caches_as_without():
    """Step by step with caches the decoder writes what it writes in one go without."""
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
def test_translate_whole(tmp_path, monkeypatch):
    """It translates, and reads each part where it stands, at least twice as much as by chance."""
    models, draw = [], translate.draw
    monkeypatch.setattr(translate, "draw", lambda model, *rest: models.append(model) or draw(model, *rest))
    assert translate.main(["--out", str(tmp_path)]) > 0.95
    text = "friday, the 23rd of march, 1984"
    translation, weights = translate.look(models[0], text)
    assert translation == "1984-03-23"
    for characters, part in ((slice(0, 4), "1984"), (slice(5, 7), "march"), (slice(8, 10), "23")):
        place = slice(text.index(part), text.index(part) + len(part))
        share = weights[:, characters, place].sum(axis=-1).mean()
        assert share > 2 * len(part) / len(text), part


def test_translate_says_what_it_cannot_read(capsys):
    with pytest.raises(SystemExit, match="2"):
        translate.main(["--text", "3/3/1984"])
    assert "got '3/3/1984'" in capsys.readouterr().err


def test_language_model(tmp_path, capsys, monkeypatch):
    """It learns, and writes the same with a cache as without, past window, ring and prompt."""
    for name, small in (("WIDTH", 64), ("LAYERS", 2), ("WINDOW", 32), ("LENGTH", 64)):
        monkeypatch.setattr(language_model, name, small)
    last = language_model.main(["--steps", "45", "--characters", "40", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert last < losses[-1] + 0.2 < losses[0] - 0.8
    apart = re.search(r"scores at most (\S+) apart", printed)
    assert float(apart[1]) < 1e-4
    assert is_picture(tmp_path / "language_model.png")
    assert is_picture(tmp_path / "language_model_distance.png")


def test_language_model_looks_back_no_further_than_its_layers_reach():
    """A character far enough back changes nothing; the nearest that can, does."""
    torch.manual_seed(0)
    model = language_model.LanguageModel().eval()
    length = language_model.LENGTH
    reach = language_model.LAYERS * (language_model.WINDOW - 1)
    codes = language_model.encode(language_model.TEXT[: length + 1])[None, :length]
    with torch.no_grad():
        scores = model(codes)[0, -1]
        for distance, same in ((reach + 1, True), (reach, False)):
            other = codes.clone()
            other[0, -1 - distance] = (other[0, -1 - distance] + 1) % len(language_model.CHARACTERS)
            assert torch.equal(model(other)[0, -1], scores) is same


def test_language_model_says_what_it_cannot_write(capsys):
    with pytest.raises(SystemExit, match="2"):
        language_model.main(["--prompt", "日本"])
    assert "got '日本'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        language_model.main(["--characters", "5000"])
    assert "--characters: expected 1 to 4076 after this prompt, got 5000" in capsys.readouterr().err


@pytest.mark.slow
def test_language_model_whole(tmp_path):
    """Well below what counts of three characters in a row give on the same tenth, 1.98 nats."""
    assert language_model.main(["--out", str(tmp_path)]) < 1.75


@pytest.fixture(scope="module")
def random_bert(tmp_path_factory):
    """A folder with a small model of MiniLM's kind, its weights as they are drawn."""
    folder = tmp_path_factory.mktemp("bert")
    sentences = " ".join(sentence for sentence, _ in word_links.SENTENCES)
    words = re.findall(r"\w+|[^\w\s]", f"{sentences} The cup broke because it was thin".lower())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes))
    model.save_pretrained(folder)
    return folder


def test_word_links(random_bert, tmp_path, capsys):
    """What is drawn and printed is the attention that transformers' own computes."""
    arguments = ["--model", str(random_bert), "--layer", "1", "--out", str(tmp_path)]
    recordings = word_links.main([*arguments, "--text", "The animal broke the law", "--word", "Law"])
    printed = capsys.readouterr().out
    eager = transformers.BertModel.from_pretrained(random_bert, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_bert)
    for number, recording in enumerate(recordings, 1):
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(recording.tokens)])
        with torch.no_grad():
            expected = eager(ids, output_attentions=True).attentions
        for layer, weights in zip(recording.layers, expected, strict=True):
            np.testing.assert_allclose(layer.weights, weights.numpy(), atol=1e-6)
        assert is_picture(tmp_path / f"word_links_{number}_layers.png")
        assert is_picture(tmp_path / f"word_links_{number}_heads.png")
        assert "</html>" in (tmp_path / f"word_links_{number}.html").read_text(encoding="utf-8")
    query = recordings[-1].tokens.index("law")
    mean = np.mean([layer.weights[0, :, query] for layer in recordings[-1].layers], axis=(0, 1))
    best = max(range(1, len(mean) - 1), key=mean.__getitem__)
    line = printed.split("The animal broke the law")[1].split("over all layers and heads: ")[1]
    assert line.startswith(f"{recordings[-1].tokens[best]!r} {mean[best]:.2f}")


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("--word", "them", "--word: expected one of: the cup broke because it was thin; got 'them'"),
        ("--layer", "2", "--layer: expected 0 to 1, got 2"),
    ],
)
def test_word_links_says_what_there_is(random_bert, tmp_path, capsys, option, given, message):
    with pytest.raises(SystemExit, match="2"):
        word_links.main(["--model", str(random_bert), "--layer", "1", "--out", str(tmp_path), option, given])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_word_links_of_minilm(tmp_path):
    """One head, the same in all three sentences, finds what the pronoun stands for."""
    recordings = word_links.main(["--out", str(tmp_path)])
    for recording, word, noun in zip(recordings, ("its", "it", "it"), ("law", "animal", "cup"), strict=True):
        tokens = recording.tokens
        row = recording.layers[3].weights[0, 1, tokens.index(word)]
        assert tokens[row.argmax()] == noun
