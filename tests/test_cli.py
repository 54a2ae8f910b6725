"""The command line: what it prints, and what it says where it cannot."""

import subprocess
import sys

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import fastattn
from fastattn.cli import app, main


def run(*arguments):
    return CliRunner().invoke(app(), arguments)


def test_version():
    assert run("version").output == f"{fastattn.__version__}\n"


def test_config_is_show_config(capsys):
    fastattn.show_config()
    assert run("config").output.splitlines()[0] == capsys.readouterr().out.splitlines()[0]


def test_explain_says_what_would_run():
    arguments = ["--shape", "2,6,32,64", "--kv-shape", "2,2,48,64", "--value-dim", "40", "--causal"]
    result = run("explain", *arguments, "--backend", "reference")
    assert result.exit_code == 0
    assert "float32 B=2 Hq=6 Hkv=2 Lq=32 Lk=48 D=64 Dv=40" in result.output
    assert "reference" in result.output


def test_explain_takes_sizes_that_no_memory_holds():
    assert run("explain", "--shape", "1000,64,100000,128").exit_code == 0


def test_explain_takes_bfloat16():
    pytest.importorskip("ml_dtypes")
    assert "bfloat16" in run("explain", "--shape", "1,2,4,8", "--dtype", "bfloat16").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2,6,32"], "--shape: expected four sizes, such as 1,8,512,64, got '2,6,32'"),
        (["--shape", "2,6,32,x"], "--shape: expected four sizes"),
        (["--shape", "1,1,1,1", "--kv-shape", "1,1,-1,1"], "--kv-shape: expected four sizes"),
        (
            ["--shape", "1,1,1,1", "--dtype", "int8"],
            "--dtype: expected float64, float32, bfloat16 or float16",
        ),
        (["--shape", "1,1,1,1", "--value-dim", "-1"], "--value-dim: expected a size, got -1"),
        (["--shape", "1,5,1,8", "--kv-shape", "1,2,1,8"], "error: "),
        (["--shape", "1,1,1,8", "--backend", "gpu"], "error: "),
    ],
)
def test_explain_says_what_is_wrong(arguments, message):
    result = run("explain", *arguments)
    assert result.exit_code == 2 and message in result.output


def test_without_typer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer .*pip install 'fastattn\[cli\]'"):
        main()


def test_python_m_fastattn():
    command = [sys.executable, "-m", "fastattn", "version"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        == fastattn.__version__
    )
