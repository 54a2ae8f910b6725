"""The Hopper kernels in `model_check`: right under any schedule, and planted faults are noticed."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import numpy as np
import pytest

from model_check import GPU, Descriptor, Fault, Number, Pointer, launch, load_kernels

SCHEDULES = 12
SCALE = 0.5


class Case(NamedTuple):
    """A call on tiles of 4 rows by 4 keys."""

    queries: int
    keys: int
    causal: bool
    offset: int
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    programs: int = 2


CASES = [
    Case(1, 1, False, 0),
    Case(4, 12, False, 0, batch=2),
    Case(9, 10, False, 0, programs=3),
    Case(9, 9, True, 0),
    Case(10, 13, True, 3, heads=4, kv_heads=2),
    Case(10, 12, True, 2),
    Case(13, 6, True, -7),  # tiles in which no row sees anything
    Case(9, 13, True, 0, programs=1),  # keys that no row sees
]


def inputs(case: Case, seed: int) -> list[np.ndarray]:
    """Query, key, value and a gradient of the output, float32, head_dim 4."""
    random = np.random.default_rng(seed)
    rows = [
        (case.heads, case.queries),
        (case.kv_heads, case.keys),
        (case.kv_heads, case.keys),
        (case.heads, case.queries),
    ]
    return [random.standard_normal((case.batch, *row, 4)).astype(np.float32) for row in rows]


def weights(case: Case, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention's weights and log-sum-exp by their definition."""
    scores = SCALE * q.astype(np.float64) @ np.repeat(k, case.heads // case.kv_heads, 1).swapaxes(2, 3)
    if case.causal:
        hidden = np.arange(case.keys) > np.arange(case.queries)[:, None] + case.offset
        scores = np.where(hidden, -np.inf, scores)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    return np.exp(scores - np.where(np.isinf(lse), 0, lse)[..., None]), lse


def run_forward(module: types.ModuleType, case: Case, seed: int, stages: int = 2, own: bool = True) -> None:
    q, k, v, _ = inputs(case, seed)
    out, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
    heads = case.batch * case.heads
    launch(
        module.forward_kernel,
        min(case.programs, -(-case.queries // 4) * heads),
        seed,
        Descriptor(q, [1, 1, 2, 4]),
        Descriptor(k, [1, 1, 4, 4]),
        Descriptor(v, [1, 1, 4, 4]),
        Descriptor(out, [1, 1, 2, 4]),
        Pointer(lse),
        Pointer(np.zeros(1, np.int64)) if case.causal else None,
        SCALE,
        *map(
            Number,
            (
                case.queries,
                case.keys,
                case.heads,
                heads,
                case.heads // case.kv_heads,
                case.offset if case.causal else case.keys,
            ),
        ),
        GROUP=case.heads // case.kv_heads,
        STAGES=stages,
        CAUSAL=case.causal or case.keys % 4 != 0,
        OWN_OUTPUT=own,
        num_warps=4,
    )
    p, expected_lse = weights(case, q, k)
    expected = p @ np.repeat(v, case.heads // case.kv_heads, 1)
    np.testing.assert_allclose(out, expected, atol=2e-6, err_msg="out")
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6, err_msg="lse")


class Backward(NamedTuple):
    """The kernels of a backward."""

    keys: Any
    queries: Any


def load_backward(*changes: tuple[str, str]) -> Backward:
    """Load both, with changes for either."""
    left = {}
    kernels = []
    for kind in ("key", "query"):
        name = f"hopper_{kind}_gradient"
        source = (GPU / f"{name}.py").read_text() + (GPU / "hopper_tiles.py").read_text()
        mine = [change for change in changes if change[0] in source]
        left |= dict(mine)
        kernels.append(getattr(load_kernels(name, *mine), f"{kind}_gradient_kernel"))
    assert len(left) == len(changes), "nothing to change"
    return Backward(*kernels)


def run_backward(kernels: Backward, case: Case, seed: int, stages: int = 2) -> None:
    q, k, v, grad = inputs(case, seed)
    group = case.heads // case.kv_heads
    p, lse = weights(case, q, k)
    dp = grad @ np.repeat(v, group, 1).swapaxes(2, 3)
    delta = (p * dp).sum(-1)
    ds = p * (dp - delta[..., None])
    by_group = (case.batch, case.kv_heads, group, case.keys, 4)
    expected = {
        "dq": SCALE * ds @ np.repeat(k, group, 1),
        "dk": SCALE * (ds.swapaxes(2, 3) @ q).reshape(by_group).sum(2),
        "dv": (p.swapaxes(2, 3) @ grad).reshape(by_group).sum(2),
    }
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    level = np.where(np.isinf(lse), np.inf, lse / np.log(2)).reshape(-1, case.queries).astype(np.float32)
    delta = delta.reshape(-1, case.queries).astype(np.float32)
    sizes = [Number(x) for x in (case.queries, case.keys, case.heads)]
    constants = dict(GROUP=group, STAGES=stages, CAUSAL=case.causal, num_warps=4)
    rows, half = [1, 1, 4, 4], [1, 1, 2, 4]
    heads = case.batch * case.kv_heads
    launch(
        kernels.keys,
        -(-case.keys // 4) * heads,
        seed,
        Descriptor(q, rows),
        Descriptor(k, half),
        Descriptor(v, half),
        Descriptor(grad, rows),
        Descriptor(level, [1, 4]),
        Descriptor(delta, [1, 4]),
        Descriptor(dk, half),
        Descriptor(dv, half),
        SCALE,
        *sizes,
        Number(heads),
        Number(1),
        Number(case.offset),
        **constants,
    )
    heads = case.batch * case.heads
    launch(
        kernels.queries,
        -(-case.queries // 4) * heads,
        seed,
        Descriptor(q, half),
        Descriptor(k, rows),
        Descriptor(v, rows),
        Descriptor(grad, half),
        Descriptor(dq, half),
        Pointer(level),
        Pointer(delta),
        SCALE,
        *sizes,
        Number(heads),
        Number(group),
        Number(case.offset),
        Number(case.queries),
        **constants,
    )
    for name, result in (("dq", dq), ("dk", dk), ("dv", dv)):
        np.testing.assert_allclose(result, expected[name], atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def forward() -> types.ModuleType:
    return load_kernels("hopper_forward")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("stages", "own"), [(2, True), (3, True), (2, False)])
def test_forward_is_right_under_every_schedule(
    forward: types.ModuleType, case: Case, stages: int, own: bool
) -> None:
    for seed in range(SCHEDULES):
        run_forward(forward, case, seed, stages, own)


def test_a_schedule_can_be_repeated(forward: types.ModuleType) -> None:
    """A seed stands for one order of events."""

    def events(seed: int) -> list[Any]:
        seen: list[Any] = []
        module = load_kernels("hopper_forward")
        get = module.Queue.get
        module.Queue.get = lambda self, count: seen.append((count, get(self, count))) or seen[-1][1]
        run_forward(module, CASES[4], seed)
        return seen

    assert events(3) == events(3)
    assert events(3) != events(4)


FORWARD_FAULTS = {
    "the producer waits for the phase before": (
        "((count // self.STAGES) & 1) ^ 1",
        "(count // self.STAGES) & 1",
    ),
    "the producer does not wait for a free slot": (
        "        mbarrier.wait(self.empty.index(slot), ((count // self.STAGES) & 1) ^ 1)\n",
        "",
    ),
    "a consumer waits for the phase before": (
        "mbarrier.wait(self.full.index(count % self.STAGES), (count // self.STAGES) & 1, pred=pred)",
        "mbarrier.wait(self.full.index(count % self.STAGES), ((count // self.STAGES) & 1) ^ 1, pred=pred)",
    ),
    "one arrival frees a slot": ("allocate_barriers(STAGES, CONSUMERS)", "allocate_barriers(STAGES, 1)"),
    "three arrivals free a slot": ("allocate_barriers(STAGES, CONSUMERS)", "allocate_barriers(STAGES, 3)"),
    "the rings start again with each tile": ("        filled += blocks\n", ""),
    "a consumer starts the rings again with each tile": (
        "        used += blocks\n",
        "        used = blocks\n",
    ),
    "the bytes of another tile are expected": (
        "self.full.index(slot), source.block_type.nbytes",
        "self.full.index(slot), 8",
    ),
    "keys are not released": ("    shared.keys.release(at)\n", ""),
    "keys are released before the scores are there": (
        "    scores = warpgroup_mma_wait(1, deps=(scores,))\n    key_row",
        "    shared.keys.release(at)\n    scores = warpgroup_mma_wait(1, deps=(scores,))\n    key_row",
    ),
    "values are released one block early": (
        "    shared.values.release(at - 1)\n",
        "    shared.values.release(at)\n",
    ),
    "the last values are not released": ("        shared.values.release(used - 1)\n", ""),
    "values are not awaited": ("    shared.values.wait(at - 1)\n", ""),
    "the next keys are not awaited": ("    shared.keys.wait(at + 1, pred=i + 1 < blocks)\n", ""),
    "keys beyond the last are awaited": (
        "shared.keys.wait(at + 1, pred=i + 1 < blocks)",
        "shared.keys.wait(at + 1)",
    ),
    "scores are used before they are there": (
        "scores = warpgroup_mma_wait(1, deps=(scores,))",
        "scores = warpgroup_mma_wait(2, deps=(scores,))",
    ),
    "queries are not awaited": ("        mbarrier.wait(shared.queries_full.index(WHO), taken & 1)\n", ""),
    "queries are overwritten": (
        "        mbarrier.wait(shared.queries_empty.index(who), (taken & 1) ^ 1)\n",
        "",
    ),
    "queries are released before the last scores": (
        "        cut = 1\n",
        "        mbarrier.arrive(shared.queries_empty.index(WHO), count=1)\n        cut = 1\n",
    ),
    "the queue has one slot": ("QUEUE = gl.constexpr(2)", "QUEUE = gl.constexpr(1)"),
    "a tile is announced before it is written": (
        "        self.tiles.index(count % QUEUE).store(gl.full([1], tile, gl.int32, layout))\n"
        "        mbarrier.arrive(self.full.index(count % QUEUE), count=1)\n",
        "        mbarrier.arrive(self.full.index(count % QUEUE), count=1)\n"
        "        self.tiles.index(count % QUEUE).store(gl.full([1], tile, gl.int32, layout))\n",
    ),
    "the end is not announced": ("    shared.queue.put(taken, tile)\n\n", "\n"),
    "programs take the same tiles": ("gl.num_programs(0) + gl.atomic_add", "gl.atomic_add"),
    "the output overtakes the last one": ("        tma.store_wait(0)  # the last", "        # the last"),
    "the program ends before its output has left": (
        "    tma.store_wait(0)\n\n\n@gluon.jit(",
        "\n\n@gluon.jit(",
    ),
    "the output is copied without a fence": (
        "        fence_async_shared()\n        store_tile(",
        "        store_tile(",
    ),
    "barriers are used without a fence": ("    fence_async_shared()\n    gl.warp", "    gl.warp"),
}


@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_faults_of_the_forward_are_noticed(fault: str) -> None:
    module = load_kernels("hopper_forward", FORWARD_FAULTS[fault])
    with pytest.raises((Fault, AssertionError)):
        for seed in range(40):
            for case in CASES[1:]:
                run_forward(module, case, seed)


def test_queries_that_share_memory_with_the_output_are_released_after_it() -> None:
    late = "            tma.store_wait(0)\n            mbarrier.arrive(shared.queries_empty"
    module = load_kernels("hopper_forward", (late, "            mbarrier.arrive(shared.queries_empty"))
    with pytest.raises(Fault):
        for seed in range(40):
            run_forward(module, CASES[2], seed, own=False)


@pytest.fixture(scope="module")
def backward() -> Backward:
    return load_backward()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_backward_is_right_under_every_schedule(backward: Backward, case: Case, stages: int) -> None:
    for seed in range(SCHEDULES // 2):
        run_backward(backward, case, seed, stages)


BACKWARD_FAULTS = {
    "the producer waits for the phase before": (
        "((count // self.STAGES) & 1) ^ 1",
        "(count // self.STAGES) & 1",
    ),
    "rows are copied into a slot in use": (
        "        mbarrier.wait(self.empty.index(slot), ((count // self.STAGES) & 1) ^ 1)\n        full",
        "        full",
    ),
    "keys are copied into a slot in use": (
        "        mbarrier.wait(self.empty.index(slot), ((count // self.STAGES) & 1) ^ 1)\n        mbarrier",
        "        mbarrier",
    ),
    "one arrival frees rows": (
        "        allocate_barriers(STAGES, CONSUMERS),",
        "        allocate_barriers(STAGES, 1),",
    ),
    "one arrival frees keys": (
        ", allocate_barriers(STAGES, CONSUMERS), STAGES)",
        ", allocate_barriers(STAGES, 1), STAGES)",
    ),
    "the bytes of lse are not expected": (
        "query.block_type.nbytes + lse.block_type.nbytes",
        "query.block_type.nbytes",
    ),
    "rows are not released": ("    rows.release(count)\n", ""),
    "rows are released before the last products": (
        "    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))\n    rows.release(count)\n",
        "    rows.release(count)\n    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))\n",
    ),
    "one product is not awaited": ("dk, dv = warpgroup_mma_wait(0,", "dk, dv = warpgroup_mma_wait(1,"),
    "queries are not awaited": ("    mbarrier.wait(rows.queries_full.index(slot), phase)\n", ""),
    "the output's gradient is not awaited": ("    mbarrier.wait(rows.grads_full.index(slot), phase)\n", ""),
    "rows of another phase are awaited": ("    phase = (count // rows.STAGES) & 1", "    phase = count & 1"),
    "the tile of keys is not awaited": ("    mbarrier.wait(tile.full.index(WHO), 0)\n", ""),
    "the tile of queries is not awaited": ("    mbarrier.wait(shared.full.index(WHO), 0)\n", ""),
    "heads of a group use the ring anew": (
        "            filled += 1\n",
        "            filled = block - start + 1\n",
    ),
    "keys are released before their second product": (
        "    dq = warpgroup_mma_wait(0, deps=(dq,))\n    shared.keys.release(i)\n",
        "    shared.keys.release(i)\n    dq = warpgroup_mma_wait(0, deps=(dq,))\n",
    ),
    "values are not released": ("    shared.values.release(i)\n", ""),
    "values are not awaited": ("    shared.values.wait(i)\n", ""),
    "gradients are copied without a fence": ("    fence_async_shared()\n    store_tile(", "    store_tile("),
    "the program ends before its gradients have left": ("    tma.store_wait(0)\n", ""),
    "barriers are used without a fence": ("    fence_async_shared()\n    gl.warp", "    gl.warp"),
    "the causal rule is off by one": (
        "maximum(row + self.offset + 1, 0)",
        "maximum(row + self.offset + 2, 0)",
    ),
    "a block of queries too few is cut": (
        "maximum(key_row + BLOCK_N - 1 -",
        "maximum(key_row + BLOCK_N - 2 -",
    ),
}


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_faults_of_the_backward_are_noticed(fault: str) -> None:
    kernels = load_backward(BACKWARD_FAULTS[fault])
    with pytest.raises((Fault, AssertionError)):
        for seed in range(40):
            for case in CASES[1:]:
                run_backward(kernels, case, seed)
