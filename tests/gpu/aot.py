"""Compiles kernels for a GPU that is not there, through the functions that launch them on one that is.

    PYTHONPATH=tests python tests/gpu/aot.py TARGET[,TARGET] JOB ...

prints a line of JSON for each job that it begins, for each kernel compiled, and at the end of each job. It is
a process of its own, because a layout that cannot be compiled ends it. With --options VERSION it says what
would be compiled by that version of Triton, and compiles nothing.

Tensors are torch's fakes: they have a device, shapes and strides, but no memory.
"""

from __future__ import annotations

import importlib
import json
from argparse import ArgumentParser
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from binaries import describe, disassembled, exponentials_beside_no_product
from fastattn.gpu import configs
from fastattn.gpu.append import Rotary, Update
from fastattn.gpu.call import Call, Gradients, Ragged, segments_of
from fastattn.gpu.config_tables import tables
from interpreter import use_target
from jobs import AHEAD, JOBS, TARGETS, Job, Target
from portable import call_of

PAGE = 16  # keys of a page
ALIGNED = 1 << 20  # an address as torch's allocator gives them


def pretend(target: Target) -> None:
    """Let torch and Triton find this GPU."""
    use_target(GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32))
    torch.version.hip = "6.4" if target.backend == "hip" else None
    torch.cuda.get_device_capability = lambda device=None: target.capability
    properties = SimpleNamespace(
        name=target.name,
        major=target.capability[0],
        minor=target.capability[1],
        multi_processor_count=132,
        gcnArchName=target.name,
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    FakeTensor.copy_ = lambda self, source: self  # which looks for the device itself
    FakeTensor.data_ptr = lambda self: ALIGNED + self.storage_offset() * self.element_size()


def compile_instead(report: Callable[[Any], None], compiles: bool) -> None:
    """Let launches compile, and `report` what came out."""
    plain = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        told = {name: value for name, value in options.items() if name.isupper() or name.startswith("num_")}
        record = {"kernel": self.__name__, "options": told}
        if compiles:
            kernel = plain(self, *arguments, grid=grid, warmup=True, **options)
            record |= describe(kernel)
            if told.get("AHEAD"):
                record["exp2 beside no product"] = exponentials_beside_no_product(disassembled(kernel))
        report(record)

    JITFunction.run = run


def on_device(value: Any) -> Any:
    """A tensor's likeness on the GPU; those in a tuple, too."""
    if isinstance(value, tuple):
        return type(value)(*map(on_device, value))
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def launch(job: Job) -> None:
    """Call the function that the job names."""
    case, dtype = job.case, getattr(torch, job.dtype)
    query = torch.empty(*case.scores_shape[:3], case.head_dim, dtype=dtype)
    key, value = (
        torch.empty(case.batch, case.kv_heads, case.seqlen_k, size, dtype=dtype)
        for size in (case.head_dim, case.value_dim)
    )
    options = case.options(job.dtype, "torch") | {"dropout_p": job.dropout_p}
    given = serving(call_of(query, key, value, **options)._replace(tf32=job.tf32), job.serving)
    launcher = getattr(importlib.import_module(f"fastattn.gpu.{job.launcher}"), job.launcher)
    with FakeTensorMode():
        call = on_device(given)
        rows = call.query.shape[:3]
        out = call.query.new_empty(*rows, call.value.shape[3])
        lse = call.query.new_empty(rows, dtype=torch.float32)
        weights = call.query.new_empty(*rows, call.seqlen_k)
        if job.launcher == "weights":
            launcher(call, lse, weights)
        elif job.launcher == "append":
            launcher(update_of(call))
        elif job.launcher == "backward":
            launcher(call, out, lse, out, None, None, memory_for(call), job.atomic)
        elif job.ahead:
            launcher(call, out, lse, configs.ahead(job.launcher, call)[job.ahead - 1])
        else:
            launcher(call, out, lse)


def serving(call: Call, kind: str) -> Call:
    """The call with what else it is to have, by the words of `kind`."""
    batch, rows = call.batch, call.query.shape[2]
    for word in kind.split():
        if word == "padded":
            starts, lengths = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), rows)
            call = call._replace(kv_starts=starts, query_lengths=lengths)
        elif word == "segments":
            ids = (torch.zeros(batch, length, dtype=torch.int64) for length in (rows, call.seqlen_k))
            call = call._replace(segments=segments_of(*ids))
        elif word == "ragged":
            query, key, value = (
                torch.empty(1, x.shape[1], batch * x.shape[2], x.shape[3], dtype=x.dtype)
                for x in (call.query, call.key, call.value)
            )
            starts = torch.zeros(batch + 1, dtype=torch.int32)
            call = call._replace(query=query, key=key, value=value, ragged=Ragged(starts, starts))
        elif word == "paged":
            slots = call.key.shape[2] // PAGE
            key, value = (
                torch.empty(batch * slots, x.shape[1], PAGE, x.shape[3], dtype=x.dtype)
                for x in (call.key, call.value)
            )
            table = torch.zeros(batch, slots, dtype=torch.int32)
            call = call._replace(key=key, value=value, block_table=table)
        else:
            codes = {"int8": torch.int8, "e4m3": torch.uint8, "e5m2": torch.float8_e5m2}[word]
            key, value = (torch.empty(x.shape, dtype=codes) for x in (call.key, call.value))
            scale = torch.empty(key.shape[:3])
            call = call._replace(key=key, value=value, key_scale=scale, value_scale=scale)
    return call


def update_of(call: Call) -> Update:
    """As many new keys as queries, which are turned."""
    batch, (rows, dim) = call.batch, call.query.shape[2:]
    angles = call.query.new_empty(call.seqlen_k, dim // 2, dtype=torch.float32)
    starts = call.query.new_empty(batch, dtype=torch.int64)
    new = call.query.new_empty(batch, call.key.shape[1], rows, dim)
    caches = call.key, call.value, call.key_scale, call.value_scale, call.block_table
    rotary = Rotary(angles, angles, False, starts, 1)
    return Update(call.query, call.query, new, new, *caches, starts, call.seqlen_k, rotary)


def memory_for(call: Call) -> Gradients:
    """Room for every gradient that the call has; the bias of a job is one for all sequences."""
    wide = {"dtype": torch.float32}
    heads, rows, keys = call.query.shape[1], call.query.shape[2], call.seqlen_k
    return Gradients(
        torch.empty_like(call.query),
        torch.empty_like(call.key),
        torch.empty_like(call.value),
        None if call.bias is None else call.query.new_empty(1, heads, rows, keys, **wide),
        None if call.alibi_slopes is None else call.query.new_empty(call.batch, heads, **wide),
        None if call.sinks is None else call.query.new_empty(heads, **wide),
    )


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("targets")
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--options", metavar="VERSION")
    given = parser.parse_args()

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    if given.options:
        configs.TABLES = tables(given.options)
    compile_instead(lambda record: tell(**record), compiles=not given.options)
    for target in given.targets.split(","):
        pretend(TARGETS[target])
        for name in given.jobs:
            tell(begin=name)
            launch(JOBS.get(name) or AHEAD[name])
            tell(end=name, target=target)


if __name__ == "__main__":
    main()
