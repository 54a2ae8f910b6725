"""Who decides the number of threads: each source wins over those after it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn as fa
from fastattn._threads import _cgroup_limits, num_threads_and_source
from processes import output_of, run_python


def in_a_new_process(**variables: str) -> str:
    """The number and its source, where torch is not loaded."""
    code = "from fastattn._threads import num_threads_and_source as f; print(*f(), sep=': ')"
    return output_of(code, **variables)


def test_order_of_the_sources(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("FASTATTN_NUM_THREADS", raising=False)
    assert num_threads_and_source() == (torch.get_num_threads(), "torch.get_num_threads")
    fa.set_num_threads(3)
    assert num_threads_and_source() == (3, "set_num_threads")
    assert fa.get_num_threads() == 3
    fa.set_num_threads(None)
    assert fa.get_num_threads() == torch.get_num_threads()


def test_environment_wins_over_torch(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FASTATTN_NUM_THREADS", "5")
    assert num_threads_and_source() == (5, "FASTATTN_NUM_THREADS")
    fa.set_num_threads(2)
    assert num_threads_and_source() == (2, "set_num_threads")


def test_torch_may_change_its_mind(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("FASTATTN_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fa.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_without_torch() -> None:
    available = len(os.sched_getaffinity(0))
    number, source = in_a_new_process().split(": ")
    assert source == "available CPUs"
    assert 1 <= int(number) <= available
    assert in_a_new_process(OMP_NUM_THREADS="3") == "3: OMP_NUM_THREADS"
    assert in_a_new_process(OMP_NUM_THREADS="4,2") == "4: OMP_NUM_THREADS"
    assert in_a_new_process(OMP_NUM_THREADS="3", FASTATTN_NUM_THREADS="1") == "1: FASTATTN_NUM_THREADS"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "1e3"])
def test_garbage_in_the_environment(text: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FASTATTN_NUM_THREADS", text)
    message = f"FASTATTN_NUM_THREADS must be an integer from 1 to 1024, got '{text}'"
    with pytest.raises(ValueError, match=message):
        fa.get_num_threads()


@pytest.mark.parametrize(
    "n, error, message",
    [
        (0, ValueError, "n must be from 1 to 1024, got 0"),
        (1025, ValueError, "n must be from 1 to 1024, got 1025"),
        (2.0, TypeError, "n must be an int or None, got float"),
        (True, TypeError, "n must be an int or None, got bool"),
    ],
)
def test_garbage_in_set_num_threads(n: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fa.set_num_threads(n)


# Prints the number, the threads that a call came to, and what it computed.
CALL = """
import hashlib, os
import numpy as np
import fastattn as fa
here = lambda: len(os.listdir("/proc/self/task"))
before = here()
x = np.random.default_rng(0).standard_normal((2, 8, 200, 64), np.float32)
out = fa.attention(x, x, x, causal=True)
print(fa.get_num_threads(), 1 + here() - before, hashlib.sha256(out.tobytes()).hexdigest())
"""


@cache
def digest_of_two_threads() -> str:
    return output_of(CALL, FASTATTN_NUM_THREADS="2").split()[-1]


@pytest.mark.parametrize(
    "variables, number, threads",
    [
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"OMP_NUM_THREADS": "64"}, 64, 32),
        ({"FASTATTN_NUM_THREADS": "1"}, 1, 1),
        ({"FASTATTN_NUM_THREADS": "64"}, 64, 32),
        ({"FASTATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "64"}, 3, 3),
        ({"FASTATTN_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"}, 8, 3),
        ({"FASTATTN_NUM_THREADS": "4", "OMP_STACKSIZE": "1"}, 4, 4),  # libgomp: less than minimum, ignored
    ],
    ids=lambda value: " ".join(f"{n}={v}" for n, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_call_under_these_variables(variables: dict[str, str], number: int, threads: int) -> None:
    """No more threads than were allowed, nor than there are tasks; the bits are always the same."""
    numbers, digest = output_of(CALL, **variables).rsplit(" ", 1)
    told, came_to = map(int, numbers.split())
    assert told == number
    assert 1 < came_to <= number if threads == 32 else came_to == threads
    assert digest == digest_of_two_threads()


@pytest.mark.parametrize("text", ["many", "-3", "0", "", "99999999999999999999"])
def test_garbage_in_openmp_variables(text: str) -> None:
    """libgomp itself complains about some; what cannot be used counts as unset."""
    done = run_python(CALL, OMP_NUM_THREADS=text, OMP_STACKSIZE=text, GOMP_STACKSIZE=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == in_a_new_process().split(":")[0]


def test_garbage_reaches_a_call() -> None:
    done = run_python(CALL, FASTATTN_NUM_THREADS="many")
    assert "ValueError: FASTATTN_NUM_THREADS must be an integer from 1 to 1024, got 'many'" in done.stderr


def test_bound_threads_count_all_cpus() -> None:
    """OMP_PROC_BIND ties even the first thread to one CPU, as soon as libgomp is loaded."""
    assert in_a_new_process(OMP_PROC_BIND="true") == in_a_new_process()


def test_affinity_counts() -> None:
    one = min(os.sched_getaffinity(0))
    number = output_of(
        f"import os; os.sched_setaffinity(0, {{{one}}}); import fastattn; print(fastattn.get_num_threads())"
    )
    assert number == "1"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 4, reason="teams of two sizes need four CPUs")
def test_threads_outlive_a_smaller_call() -> None:
    """A call with few tasks does not end the threads of those with many."""
    program = """
        import os
        import numpy as np
        import fastattn as fa
        here = lambda: set(os.listdir("/proc/self/task"))
        fa.set_num_threads(4)
        x = np.ones((1, 8, 256, 64), np.float32)
        fa.attention(x, x, x)
        threads = here()
        few = x[:, :2, :4]
        fa.attention(few, few, few)
        fa.attention(x, x, x)
        assert here() == threads
    """
    output_of(program)


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def limits(tmp_path: Path, membership: str) -> list[float]:
    write(tmp_path, "membership", membership)
    return list(_cgroup_limits(tmp_path / "membership", tmp_path / "cgroup"))


def test_cgroup_version_2(tmp_path: Path) -> None:
    """Every group counts, from the process's own to the outermost."""
    write(tmp_path / "cgroup/outer/inner", "cpu.max", "max 100000\n")
    write(tmp_path / "cgroup/outer", "cpu.max", "250000 100000\n")
    assert limits(tmp_path, "0::/outer/inner\n") == [2.5]
    assert limits(tmp_path, "0::/\n") == []
    write(tmp_path / "cgroup", "cpu.max", "400000 100000\n")
    assert limits(tmp_path, "0::/outer/inner\n") == [2.5, 4.0]
    assert limits(tmp_path, "0::/path/of/the/host\n") == [4.0]


def test_cgroup_version_1(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu/box", "cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "cgroup/cpu/box", "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cgroup/cpu", "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cgroup/cpu", "cpu.cfs_period_us", "100000\n")
    assert limits(tmp_path, "4:memory:/box\n3:cpu,cpuacct:/box\n2:cpuset:/box\n") == [0.5]
    assert limits(tmp_path, "3:cpu,cpuacct:/\n1:name=systemd:/box\n") == []


def test_no_cgroups(tmp_path: Path) -> None:
    assert list(_cgroup_limits(tmp_path / "missing", tmp_path)) == []
    write(tmp_path / "cgroup", "cpu.max", "nonsense\n")
    assert limits(tmp_path, "0::/\n") == []
