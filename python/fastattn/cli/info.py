"""``fastattn info``: what this installation is, and what it made of the machine."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.table import Table

from fastattn import _config
from fastattn.cli.console import err, mendable, out, print_facts, print_json

EXAMPLES = ("fastattn info", "FASTATTN_ISA=avx2 fastattn info", "fastattn info --json | jq .threads")
_TIERS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_fp16")  # weakest first


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print versions, instruction sets and which was chosen and why, threads, OpenMP, GPUs, variables."""
    with mendable(ValueError, RuntimeError):  # of variables that no call could use either
        facts = gather()
    if as_json:
        print_json(facts)
        return
    console = out()
    rows = {name: text for name, text in facts.items() if isinstance(text, str)}
    console.print(_tier_table(facts["instruction sets"]))
    console.print()
    print_facts(rows, console)
    found = facts["variables"]
    text = "\n".join(f"{name}={value}" for name, value in found.items())
    print_facts({"variables": text or f"none set of {', '.join(_config.VARIABLES)}"}, console)


def gather() -> dict[str, Any]:
    """Everything there is to say: texts by their names, and two that are more than a text."""
    facts: dict[str, Any] = _config.config()  # before torch is loaded: threads are those of NumPy's users
    for name in ("environment", "ISAs", "CPU features"):
        facts.pop(name, None)
    if not facts["torch"].startswith("not installed"):
        with err().status("asking torch for GPUs"):
            import torch  # noqa: F401

        facts.pop("GPU", None)  # not there where torch had been imported before
        facts |= _config.gpus()
        threads = _config.config()["threads"]
        if threads != facts["threads"]:
            facts["threads"] += f"; where torch is loaded, {threads}"
        facts["torch"], facts["triton"] = (facts[x].replace(" (not loaded)", "") for x in ("torch", "triton"))
    facts["instruction sets"] = tiers()
    facts["variables"] = {name: os.environ[name] for name in _config.VARIABLES if os.environ.get(name)}
    return facts


def tiers() -> list[dict[str, str]]:
    """Each tier of kernels, whether it is chosen, and why or why not; none without compiled kernels."""
    try:
        from fastattn import _core
    except ImportError:
        return []
    compiled, available, chosen = _core.compiled_isas(), _core.available_isas(), _core.selected_isa()
    features = _core.cpu_features()
    forced = os.environ.get("FASTATTN_ISA")
    rows = []
    for tier in _TIERS:
        if tier == chosen:
            state, why = "chosen", "FASTATTN_ISA asks for it" if forced else "the best for this CPU"
        elif tier not in compiled:
            state, why = "absent", "left out of this build"
        elif tier not in available:
            here = features.get(tier, False)
            owner = "the operating system grants no registers for it" if here else "this CPU does not have it"
            state, why = "absent", owner
        elif tier == "avx512_bf16" and not features["fast_bf16_dot"]:
            state, why = "left out", "slower here than float32 arithmetic: only by FASTATTN_ISA"
        elif _TIERS.index(tier) < _TIERS.index(chosen):
            state, why = "below", "does what the chosen one does not do better"
        else:
            state, why = "left out", f"FASTATTN_ISA asks for {chosen}"
        rows.append({"name": tier, "state": state, "why": why})
    return rows


def _tier_table(rows: list[dict[str, str]]) -> Table:
    table = Table(title="CPU kernels", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("instruction set", "", "why"):
        table.add_column(heading, header_style="dim")
    for row in rows:
        style = "green" if row["state"] == "chosen" else "dim" if row["state"] == "absent" else ""
        table.add_row(row["name"], row["state"], row["why"], style=style)
    if not rows:
        table.add_row("none", "", "the compiled extension cannot be loaded")
    return table
