"""The tables of tiles, which entry a call gets, and what FASTATTN_AUTOTUNE makes of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from fastattn.gpu import configs, tuning
from fastattn.gpu.call import Call
from fastattn.gpu.config_tables import Tiles, tables
from fastattn.problem import UNBOUNDED

GPUS = ("sm80", "sm90", "sm100", "sm120", "gfx942")


def call_of(
    head_dim: int = 128, rows: int = 256, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Call:
    query = torch.empty(1, 8, rows, head_dim, dtype=dtype)
    key = torch.empty(1, 2, 256, head_dim, dtype=dtype)
    plain = Call(
        query, key, key, None, None, None, None, 0, UNBOUNDED, 0, None, None, 0.0, 1.0, 0.0, 0, 0
    )  # fmt: skip
    return plain._replace(**changes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the CPU's tensors count as those of a kind of GPU."""
    return lambda name: monkeypatch.setattr(configs, "kind_of_gpu", lambda tensor: name)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("head_dim", [1, 17, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tf32", [False, True])
def test_every_call_has_tiles(
    name: str, head_dim: int, dtype: torch.dtype, tf32: bool, gpu: Callable[[str], None]
) -> None:
    gpu(name)
    for call in (
        call_of(head_dim, dtype=dtype, tf32=tf32),
        call_of(head_dim, dtype=dtype, tf32=tf32, softcap=2.0),
        call_of(head_dim, dtype=dtype, tf32=tf32, window_left=100),
        call_of(head_dim, rows=1, dtype=dtype, tf32=tf32),
    ):
        chosen = [configs.forward(call), configs.decode(call), configs.backward_bias(call)]
        chosen += [configs.backward_keys(call, False), configs.backward_queries(call, True)]
        assert all(isinstance(tiles, Tiles) for tiles in [*chosen, configs.each_score(call)])


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_tables_cover_the_same_numbers(version: str) -> None:
    forward, backward, bias, decode = tables(version)
    assert set(forward) == set(backward) == set(GPUS)
    assert set(decode) == {16, 32, 64, 128}
    assert all(rows == tiles.rows for rows, tiles in decode.items())
    for name in GPUS:
        kinds = ("half", "float32") if name == "gfx942" else ("half", "float32", "tf32")
        wanted = {(kind, columns) for kind in kinds for columns in (64, 128, 256)}
        assert set(forward[name]) == set(backward[name]) == wanted <= set(bias)


def test_a_later_triton_has_other_tiles() -> None:
    assert tables("3.6.0") == tables("3.8.1") != tables("3.9.0")
    assert tables("3.9.0") == tables("3.10.0+git1234") == tables("4.0")


def test_what_a_call_asks_for_decides(gpu: Callable[[str], None]) -> None:
    gpu("sm90")
    uses = configs.TABLES.forward["sm90"]["half", 128]
    assert len(set(uses)) == 4
    assert configs.forward(call_of()) == uses.plain
    assert configs.forward(call_of(window_left=127)) == uses.narrow
    assert configs.forward(call_of(window_left=4000)) == uses.placed == uses.plain
    assert configs.forward(call_of(dropout_p=0.1)) == uses.rich
    assert configs.forward(call_of(96, dropout_p=0.1)) == uses.ragged
    assert configs.forward(call_of(dropout_p=0.1, window_left=3)) == uses.rich
    keys = configs.TABLES.backward["sm90"]["half", 128]
    assert configs.backward_keys(call_of(), False) == keys.keys
    assert configs.backward_keys(call_of(), True) == keys.rich_keys
    assert configs.backward_keys(call_of(), False, atomic=True) == keys.atomic_keys != keys.keys
    assert configs.backward_keys(call_of(softcap=2.0), False, atomic=True) == keys.rich_keys
    assert configs.backward_queries(call_of(window_left=3), False) == keys.rich_queries


def test_a_later_triton_has_fewer_registers_for_keys_that_begin_anywhere(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("sm90")
    monkeypatch.setattr(configs, "TABLES", tables("3.9.0"))
    plain, wide = configs.forward(call_of()), configs.forward(call_of(window_left=4000))
    padded = configs.forward(call_of()._replace(kv_starts=torch.zeros(2, dtype=torch.int64)))
    assert plain != wide == padded == configs.TABLES.forward["sm90"]["half", 128].placed


@pytest.mark.parametrize(("rows", "packed"), [(1, 16), (4, 16), (5, 32), (16, 64), (17, 128), (64, 128)])
def test_decode_packs_the_queries_of_a_group(rows: int, packed: int, gpu: Callable[[str], None]) -> None:
    gpu("sm90")  # four query heads share their keys
    assert configs.decode(call_of(rows=rows)) == configs.TABLES.decode[packed]
    assert configs.decode(call_of(rows=rows)).rows == packed


@pytest.mark.parametrize(
    ("name", "head_dim", "tf32", "expected"),
    [
        ("sm90", 128, False, "tf32x3"),
        ("sm90", 129, False, "ieee"),
        ("sm90", 129, True, "tf32"),
        ("gfx942", 64, True, "ieee"),
        ("", 64, False, "ieee"),
    ],
)
def test_products_of_float32(
    name: str, head_dim: int, tf32: bool, expected: str, gpu: Callable[[str], None]
) -> None:
    gpu(name)
    assert configs.precision(call_of(head_dim, dtype=torch.float32, tf32=tf32)) == expected
    assert configs.precision(call_of(head_dim, tf32=tf32)) == "ieee"


class TestTuning:
    """Times come from a table: the launch of tiles takes their number of columns."""

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        here = SimpleNamespace(tried=[], capturing=False)

        def do_bench(run: Callable[[], None], **_: Any) -> float:
            run()
            return float(here.tried[-1].columns)

        monkeypatch.setattr(tuning, "flag", lambda name: name == "FASTATTN_AUTOTUNE")
        monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here.capturing)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(configs, "kind_of_gpu", lambda tensor: "sm90")
        monkeypatch.setattr(tuning, "_fastest", {})
        return here

    def test_the_fastest_is_kept(self, device: SimpleNamespace) -> None:
        call = call_of()
        tiles = tuning.chosen("forward", call, Tiles(128, 128, 8, 3), device.tried.append)
        assert tiles.columns == min(tried.columns for tried in device.tried)
        assert device.tried[0] == Tiles(128, 128, 8, 3)
        assert len(device.tried) == len(set(device.tried)) > 3
        count = len(device.tried)
        assert tuning.chosen("forward", call, Tiles(128, 128, 8, 3), device.tried.append) == tiles
        assert len(device.tried) == count
        tuning.chosen("forward", call_of(rows=2048), Tiles(128, 128, 8, 3), device.tried.append)
        assert len(device.tried) == 2 * count

    def test_what_the_device_lacks_is_passed_over(self, device: SimpleNamespace) -> None:
        def launch(tiles: Tiles) -> None:
            device.tried.append(tiles)
            if tiles.columns < 128:
                raise OutOfResources(300_000, 232_448, "shared memory")

        assert tuning.chosen("forward", call_of(), Tiles(128, 128, 8, 3), launch).columns == 128

    def test_nothing_is_tried_under_capture(self, device: SimpleNamespace) -> None:
        device.capturing = True
        tiles = Tiles(128, 128, 8, 3)
        assert tuning.chosen("forward", call_of(), tiles, device.tried.append) == tiles
        device.capturing = False
        assert tuning.chosen("forward", call_of(), tiles, device.tried.append) != tiles

    def test_only_where_it_is_asked_for(
        self, device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tuning, "flag", lambda name: False)
        tiles = Tiles(128, 128, 8, 3)
        assert tuning.chosen("forward", call_of(), tiles, device.tried.append) == tiles
        assert not device.tried

    @pytest.mark.parametrize("kernel", ["forward", "decode", "backward keys", "backward queries"])
    def test_there_is_something_to_try(self, kernel: str, device: SimpleNamespace) -> None:
        assert len(set(configs.candidates(kernel, call_of()))) > 2
