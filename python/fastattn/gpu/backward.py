"""Attention backward, for any GPU that Triton compiles for and every argument of a call.

Scores are computed again, once by blocks of keys for their gradients and those of values, and once by blocks
of queries for theirs, so that every sum has an order of its own and results are the same bits in each run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.gpu.bias_gradient import bias_gradient
from fastattn.gpu.call import Call, Gradients
from fastattn.gpu.key_gradient import key_gradient
from fastattn.gpu.query_gradient import query_gradient
from fastattn.gpu.row_terms import row_terms, sums_of_rows
from fastattn.gpu.rows import matrix
from fastattn.gpu.score_gradient import Incoming


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    wanted: Gradients,
    atomic: bool = False,
) -> None:
    """Write the gradients that are `wanted`; of sequences behind one another, axes are as in `Call.ragged`.

    Parameters
    ----------
    out, grad_out
        (B, Hq, Lq, Dv) of query's dtype, any strides.
    lse
        (B, Hq, Lq) float32, natural logarithm.
    grad_lse
        The same shape, or None. If gradients of weights come in, their mean has been taken away from it.
    grad_weights
        (B, Hq, Lq, Lk), any strides, or None.
    atomic
        Add up the gradient of query by atomic additions while those of key and value are made: 5 products
        instead of 7, and last bits that differ from run to run.
    """
    shape = call.query.shape[:3]
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    sink_terms = None if wanted.sinks is None else lse.new_empty(shape)
    terms = row_terms(call, out, lse, grad_out, grad_lse, sink_terms)
    incoming = Incoming(matrix(grad_out), matrix(grad_weights), terms)
    slope_terms = None if wanted.alibi_slopes is None else lse.new_empty(shape)
    query_sums = None
    if atomic and wanted.query is not None:
        query_sums = torch.zeros(call.query.shape, dtype=torch.float32, device=call.query.device)
    if query_sums is not None or wanted.key is not None or wanted.value is not None:
        key_gradient(call, incoming, wanted.key, wanted.value, query_sums)
    if query_sums is not None:
        torch.mul(query_sums, call.scale, out=wanted.query)
    if slope_terms is not None or (wanted.query is not None and query_sums is None):
        query_gradient(call, incoming, None if query_sums is not None else wanted.query, slope_terms)
    if wanted.bias is not None:
        bias_gradient(call, incoming, wanted.bias)
    if wanted.alibi_slopes is not None and slope_terms is not None:
        wanted.alibi_slopes.copy_(sums_of_rows(call, slope_terms))
    if wanted.sinks is not None and sink_terms is not None:
        wanted.sinks.copy_(sums_of_rows(call, sink_terms).sum_to_size(wanted.sinks.shape))
