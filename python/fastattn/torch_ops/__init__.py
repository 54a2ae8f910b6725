"""What torch needs to know of attention: a node for its graphs, operators for its traces and transforms.

Importing this registers the operators, and opens the short way of plain calls to tensors.
"""

from fastattn.backends import plain
from fastattn.torch_ops.caches import attention_with_kvcache as operator_with_kvcache
from fastattn.torch_ops.caches import refuse_graph
from fastattn.torch_ops.graph import attention as recorded_attention
from fastattn.torch_ops.graph import record, wants_graph
from fastattn.torch_ops.operators import attention as operator_attention
from fastattn.torch_ops.operators import backward as operator_backward
from fastattn.torch_ops.operators import is_watched

plain.bind_torch(record)

__all__ = [
    "is_watched",
    "operator_attention",
    "operator_backward",
    "operator_with_kvcache",
    "recorded_attention",
    "refuse_graph",
    "wants_graph",
]
