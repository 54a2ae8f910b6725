"""The compiled kernels for this machine's CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn._threads import get_num_threads
from fastattn.arrays import NUMPY, Strided
from fastattn.backends.base import elsewhere
from fastattn.cache_problem import CacheUpdate
from fastattn.outputs import Gradients, InsightOutputs, Outputs
from fastattn.problem import AttentionProblem

if TYPE_CHECKING:
    from fastattn._core import Tensor

    Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]

try:
    import fastattn._core as _core
except ImportError as error:
    _missing = f"the compiled extension fastattn._core cannot be loaded: {error}"
else:
    _missing = ""
    _CODES = _core.DTYPE_CODES

MAX_HEAD_DIM = 576  # latent attention of DeepSeek: 512 + 64
MAX_VALUE_DIM = 512


class CpuBackend:
    """Kernels in C++, the strongest instruction set of the machine."""

    name = "cpu"

    def supports(self, problem: AttentionProblem) -> list[str]:
        """Name memory elsewhere, a missing extension, or a head dimension beyond the register tiles."""
        reasons = elsewhere(problem)
        if _missing:
            reasons.append(_missing)
        if problem.query.shape[3] > MAX_HEAD_DIM:
            reasons.append(f"head dimension {problem.query.shape[3]} is more than {MAX_HEAD_DIM}")
        if problem.value.shape[3] > MAX_VALUE_DIM:
            reasons.append(f"value's head dimension {problem.value.shape[3]} is more than {MAX_VALUE_DIM}")
        return reasons

    def run(self, problem: AttentionProblem, outputs: Outputs) -> None:
        """Hand addresses, sizes and strides to the kernels."""
        if 0 in problem.query.shape:
            return  # no batch or no query: every output is empty
        out, lse, weights = outputs
        # Kernels read this table without the interpreter's lock: the local keeps it, the cache may not.
        _kept, offsets = _offsets(problem)
        _core.attention_forward(
            _tensor(problem.query),
            _tensor(problem.key),
            _tensor(problem.value),
            _tensor(out),
            _optional(lse),
            _optional(weights),
            *_terms(problem, offsets),
            problem.scale,
            problem.softcap,
            problem.dropout_p,
            problem.dropout_seed or 0,
            problem.dropout_offset,
            problem.window_left,
            problem.window_right,
            get_num_threads(),
            block_table=_optional(problem.block_table),
            key_scales=_optional(problem.key_scale),
            value_scales=_optional(problem.value_scale),
            **_visibility(problem),
        )

    def update_cache(self, problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
        """Hand addresses, sizes and strides to the kernel."""
        rotary, turned = update.rotary, None
        if update.new_key is None and rotary is None:
            return problem
        if rotary is not None:
            turned = problem.library.empty(problem.query.shape, problem.dtype, problem.query.array)
        _core.update_caches(
            (
                _optional(update.new_key),
                _optional(update.new_value),
                _tensor(problem.key),
                _tensor(problem.value),
                _optional(problem.key_scale),
                _optional(problem.value_scale),
                _vector(update.start),
                _optional(problem.block_table),
                None if rotary is None else _tensor(rotary.cos),
                None if rotary is None else _tensor(rotary.sin),
                _tensor(problem.query),
                _optional(turned),
                None if rotary is None else _vector(rotary.query_start),
            ),
            update.capacity,
            0 if rotary is None else rotary.query_step,
            rotary is not None and rotary.interleaved,
            get_num_threads(),
        )
        return problem if turned is None else problem._replace(query=turned)

    def run_backward(
        self, problem: AttentionProblem, outputs: Outputs, incoming: Outputs, gradients: Gradients
    ) -> None:
        """Hand addresses, sizes and strides to the kernels; all that they do not write is zero."""
        if 0 in problem.query.shape:
            for view in gradients:
                if view is not None:
                    view.numpy()[...] = 0
            return
        _kept, offsets = _offsets(problem)
        out, lse, _ = outputs
        assert lse is not None
        _core.attention_backward(
            _tensor(problem.query),
            _tensor(problem.key),
            _tensor(problem.value),
            _tensor(out),
            _tensor(lse),
            *_terms(problem, offsets),
            _tensor(incoming.out),
            _optional(incoming.lse),
            _optional(incoming.weights),
            _optional(gradients.query),
            _optional(gradients.key),
            _optional(gradients.value),
            _optional(gradients.bias),
            _optional(gradients.alibi_slopes),
            _optional(gradients.sinks),
            problem.scale,
            problem.softcap,
            problem.dropout_p,
            problem.dropout_seed or 0,
            problem.dropout_offset,
            problem.window_left,
            problem.window_right,
            get_num_threads(),
            **_visibility(problem),
        )

    def run_insight(
        self, problem: AttentionProblem, outputs: InsightOutputs, edges: NDArray[np.int64] | None
    ) -> None:
        """Hand addresses, sizes and strides to the kernel."""
        if 0 in problem.query.shape:
            for view in outputs:
                if view is not None:
                    view.numpy()[...] = 0
            return
        _kept, offsets = _offsets(problem)
        keys, weights, entropy, key_mass, out, distance_mass = outputs
        _core.attention_insight(
            _tensor(problem.query),
            _tensor(problem.key),
            _tensor(problem.value),
            _optional(out),
            _tensor(keys),
            _tensor(weights),
            _tensor(entropy),
            _tensor(key_mass),
            None if edges is None else _vector(edges),
            _optional(distance_mass),
            *_terms(problem, offsets),
            problem.scale,
            problem.softcap,
            problem.window_left,
            problem.window_right,
            get_num_threads(),
            **_visibility(problem),
        )

    def describe(self, problem: AttentionProblem) -> dict[str, str]:
        """Tell the instruction set, the path and the threads."""
        return {
            "isa": _core.selected_isa(),
            "path": _core.describe_path(_core.DTYPE_CODES[problem.dtype], problem.query.shape[2]),
            "threads": "1: this thread came out of fork()" if _core.runs_alone() else str(get_num_threads()),
        }


def _tensor(view: Strided) -> Tensor:
    return view.address, _CODES[view.dtype], view.shape, view.strides


def _optional(view: Strided | None) -> Tensor | None:
    return None if view is None else _tensor(view)


def _vector(values: NDArray[Any]) -> Tensor:
    return _tensor(NUMPY.view("", values))


def _terms(problem: AttentionProblem, offsets: Tensor) -> Terms:
    """Mask, bias, lengths of keys, `offsets`, ALiBi's slopes and sinks."""
    return (
        _optional(problem.mask),
        _optional(problem.bias),
        None if problem.kv_lengths is None else _vector(problem.kv_lengths),
        offsets,
        None if problem.alibi_slopes is None else _vector(problem.alibi_slopes),
        None if problem.sinks is None else _vector(problem.sinks),
    )


def _visibility(problem: AttentionProblem) -> dict[str, Tensor]:
    """Starts of keys, lengths of queries, segments of both, and sequences behind one another."""
    query_segments, key_segments = problem.segment_ids or (None, None)
    cu_seqlens_q, cu_seqlens_k = problem.cu_seqlens or (None, None)
    vectors = {
        "kv_starts": problem.kv_starts,
        "query_lengths": problem.query_lengths,
        "query_segments": query_segments,
        "key_segments": key_segments,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    return {name: _vector(values) for name, values in vectors.items() if values is not None}


def _offsets(problem: AttentionProblem) -> tuple[NDArray[np.int64], Tensor]:
    offset = problem.query_offset
    if isinstance(offset, int):
        return _same_for_all(offset, problem.sequence_count)
    return offset, _vector(offset)


@lru_cache(maxsize=64)
def _same_for_all(offset: int, batch: int) -> tuple[NDArray[np.int64], Tensor]:
    """One offset for every batch: the memory, and the view of it."""
    values = np.full(batch, offset, np.int64)
    return values, _vector(values)
