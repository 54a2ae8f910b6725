"""Which calls the Hopper kernels take, and when a device is trusted with them: decided on the host."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn._flags import flag
from fastattn.gpu import hopper, hopper_check, hopper_trial
from fastattn.gpu.call import Call, Gradients
from fastattn.problem import UNBOUNDED

DEVICE = torch.device("cuda", 0)


def call_of(rows: int = 70, keys: int = 90, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Call:
    shape = hopper_trial.Shape(2, 4, 2, rows, keys, True, keys - rows)
    return hopper_trial.inputs(shape, head_dim, dtype, torch.device("cpu"))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of the CPU count as those of a device that has passed."""
    monkeypatch.setattr(hopper, "_device_reasons", lambda device: [])
    monkeypatch.setattr(hopper, "_installation_reasons", lambda: ())
    monkeypatch.setattr(hopper_check, "refusal", lambda kind, head_dim, device: None)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_calls_are_taken(head_dim: int, dtype: torch.dtype) -> None:
    call = call_of(head_dim=head_dim, dtype=dtype)
    assert hopper.supports(call) == []
    assert hopper.supports(call._replace(window_right=UNBOUNDED, query_offset=1 << 60)) == []
    assert bool(hopper.backward_supports(call)) == (head_dim == 256)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("rows", "keys", "name"), [(256, 256, "portable"), (70, 257, "hopper"), (257, 9, "hopper")]
)
def test_short_calls_are_launched_the_fast_way(
    rows: int, keys: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And start no trial."""
    pytest.importorskip("triton")
    from fastattn.gpu import choice

    if name == "portable":
        monkeypatch.setattr(hopper_check, "refusal", lambda *_: pytest.fail("a trial"))
    call = call_of(rows, keys)
    ways = choice.of_forward(call), choice.of_backward(call, Gradients(), None, False)
    assert [way.name for way in ways] == [name, name]
    for batch in (1, 64):  # which have no say in it
        wide = call._replace(
            **{
                x: getattr(call, x)[:1].expand(batch, -1, -1, -1).contiguous()
                for x in ("query", "key", "value")
            }
        )
        assert choice.of_forward(wide).name == name


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("version", "taken"), [("3.6.0", True), ("3.8.1", True), ("3.9.0", False), ("4.0", False)]
)
def test_a_compiler_that_spills_is_a_reason(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    call = call_of(head_dim=128)
    assert (hopper.backward_supports(call) == []) == taken
    assert taken or f"Triton {version} spills" in hopper.backward_supports(call)[0]
    others = call._replace(window_right=UNBOUNDED), call_of(head_dim=64)
    assert not any(hopper.backward_supports(other) for other in others)
    assert hopper.supports(call) == []


ANY = torch.zeros(1)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": ANY}, "mask"),
        ({"bias": ANY}, "bias"),
        ({"kv_lengths": ANY}, "kv_lengths"),
        ({"query_offsets": ANY}, "query_offset"),
        ({"window_left": 5}, "window"),
        ({"window_right": 1}, "window"),
        ({"alibi_slopes": ANY}, "alibi_slopes"),
        ({"sinks": ANY}, "sinks"),
        ({"softcap": 1.0}, "softcap"),
        ({"dropout_p": 0.5}, "dropout_p"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"scale": float("nan")}, "scale must be above 0"),
    ],
)
def test_every_other_argument_is_a_reason(change: dict[str, Any], reason: str) -> None:
    (found,) = hopper.supports(call_of()._replace(**change))
    assert reason in found


@pytest.mark.usefixtures("on_hopper")
def test_all_reasons_are_named() -> None:
    call = call_of(head_dim=96, dtype=torch.float32)._replace(softcap=1.0, sinks=ANY)
    found = " ".join(hopper.supports(call))
    assert all(word in found for word in ("softcap", "sinks", "float32", "head_dim", "96"))


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def _odd_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)[..., :-1]


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(2, -1, -1, -1)


def _columns(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)[..., ::2]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_unaligned, "begin"),
        (_odd_rows, "multiples of 16 bytes"),
        (_expanded, "multiples of 16 bytes"),
        (_columns, "adjacent"),
    ],
)
def test_memory_that_tma_cannot_address(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    call = call_of()
    (found,) = hopper.supports(call._replace(**{name: change(getattr(call, name))}))
    assert name in found
    assert reason in found


def test_an_incoming_gradient_that_tma_cannot_address_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is contiguous, and begins at an odd number of elements."""
    from fastattn.gpu.row_terms import RowTerms

    call, seen = call_of(), []
    rows = call.query.shape[:3]
    terms = RowTerms(torch.zeros(rows), None, torch.zeros(rows))
    monkeypatch.setattr("fastattn.gpu.row_terms.row_terms", lambda *_: terms)
    monkeypatch.setattr(hopper, "_query_gradient", lambda _call, grad, *_: seen.append(grad))
    grad = _unaligned(call.query)
    hopper.backward(
        call, call.query, torch.zeros(rows), grad, None, Gradients(query=torch.empty_like(call.query))
    )
    assert hopper._layout_reasons("grad_out", grad) and hopper._layout_reasons("grad_out", seen[0]) == []
    torch.testing.assert_close(seen[0], grad, equal_nan=True)


def test_the_stride_of_an_axis_of_one_may_be_anything() -> None:
    tensor = torch.empty(64, dtype=torch.bfloat16).as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert hopper._layout_reasons("query", tensor) == []


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """What a device is, and what the environment says, is asked once in a process."""

    def forget() -> None:
        hopper._device_reasons.cache_clear()
        flag.cache_clear()

    forget()
    yield forget
    forget()


def test_a_cpu_is_no_hopper(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = hopper.supports(call_of())
    assert "cpu" in found
    monkeypatch.setenv("FASTATTN_HOPPER", "0")
    forget()
    assert hopper.supports(call_of()) == ["FASTATTN_HOPPER is 0"]


def test_other_devices_are_refused(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hopper._device_reasons(DEVICE) == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    forget()
    (found,) = hopper._device_reasons(DEVICE)
    assert "10.0" in found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A device whose trials end as `machine.ends` says; `machine.trials` counts them."""
    pytest.importorskip("triton")
    here = SimpleNamespace(trials=0, ends=(0, ""), capturing=False)

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        here.trials += 1
        if here.ends is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        code, text = here.ends
        stdout, stderr = (text, "a warning") if code == hopper_check.WRONG else ("", text)
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here.capturing)
    monkeypatch.setattr(hopper_check, "_verdicts", {})
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    return here


def ask(kind: str = "forward") -> str | None:
    return hopper_check.refusal(kind, 128, DEVICE)


def test_one_trial_for_all_processes(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask() is None
    assert ask() is None
    assert machine.trials == 1
    monkeypatch.setattr(hopper_check, "_verdicts", {})  # another process
    assert ask() is None
    assert machine.trials == 1
    assert ask("backward") is None
    assert machine.trials == 2


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((hopper_check.WRONG, "forward: the error is 0.5"), "the error is 0.5"),
        (None, "did not end within"),
    ],
)
def test_a_wrong_kernel_is_remembered(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, ends: Any, message: str
) -> None:
    machine.ends = ends
    for _ in range(2):  # processes
        monkeypatch.setattr(hopper_check, "_verdicts", {})
        with pytest.warns(RuntimeWarning, match=message):
            found = ask()
        assert found is not None
        assert message in found
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ask() == found
    assert machine.trials == 1


def test_a_trial_that_could_not_run_is_tried_again(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ends = (1, "out of memory")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert ask() is not None
    assert ask() is not None
    assert machine.trials == 1
    monkeypatch.setattr(hopper_check, "_verdicts", {})
    machine.ends = (0, "")
    assert ask() is None


def test_no_trial_under_capture(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.capturing = True
    found = ask()
    assert found is not None
    assert "CUDA graph" in found
    assert machine.trials == 0
    machine.capturing = False
    assert ask() is None
    machine.capturing = True
    monkeypatch.setattr(hopper_check, "_verdicts", {})
    assert ask() is None  # another process has seen it pass


def test_other_sources_are_tried_anew(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask() is None
    monkeypatch.setattr(hopper_check, "_verdicts", {})
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert ask() is None
    assert machine.trials == 2


def test_a_cache_that_cannot_be_written_costs_a_trial(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert ask() is None
    monkeypatch.setattr(hopper_check, "_verdicts", {})
    assert ask() is None
    assert machine.trials == 2


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trial run here, with what a test puts in the kernels' place."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2)
    )
    monkeypatch.setattr(hopper_trial, "device_of", lambda index: torch.device("cpu"))


def rounded_backward(delta_of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A backward whose P, dS and Delta are rounded as the kernels round them."""

    def backward(
        call: Call, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, _: None, wanted: Any
    ) -> None:
        dtype, group = out.dtype, call.query.shape[1] // call.key.shape[1]
        key, value = (x.float().repeat_interleave(group, 1) for x in (call.key, call.value))
        scores = call.query.float() @ key.mT * call.scale
        if call.window_right == 0:
            hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(call.query_offset + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
        delta = delta_of((out.float() * grad_out.float()).sum(-1, keepdim=True))
        inner = (weights * (grad_out.float() @ value.mT - delta)).to(dtype).float()
        per_head = {
            "key": inner.mT @ call.query.float() * call.scale,
            "value": weights.to(dtype).float().mT @ grad_out.float(),
        }
        wanted.query.copy_(inner @ key * call.scale)
        for name, gradient in per_head.items():
            shape = (*call.key.shape[:2], group, *call.key.shape[2:])
            getattr(wanted, name).copy_(gradient.view(shape).sum(2))

    return backward


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_trial_of_a_backward(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes what is rounded to 16 bits where the kernels do that, and nothing that forgets a term."""
    for delta_of, code in ((lambda delta: delta, 0), (torch.zeros_like, hopper_check.WRONG)):
        monkeypatch.setattr(hopper, "backward", rounded_backward(delta_of))
        assert hopper_trial.main("backward", head_dim, 0) == code


@pytest.mark.usefixtures("on_cpu")
def test_the_trial_notices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run on the CPU, with torch in the kernel's place: right, slightly wrong, and beyond its output."""
    faults: tuple[Callable[[torch.Tensor], Any], ...] = (
        lambda out: None,
        lambda out: out[..., -1:].mul_(1.5),
        lambda out: out.as_strided((1,), (1,), out.storage_offset() - 1).zero_(),
        lambda out: out[0, 0, 0].fill_(torch.nan),
    )
    at = 0

    def forward(call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
        expected, expected_lse = hopper_trial.reference(call)
        out.copy_(expected)
        lse.copy_(expected_lse)
        faults[at](out)

    monkeypatch.setattr(hopper, "forward", forward)
    for at in range(len(faults)):
        code = hopper_check.WRONG if at else 0
        assert hopper_trial.main("forward", 64, 0) == code
    assert "outside of out" in capsys.readouterr().out
