"""One layer of self-attention beside recurrent networks: cost, memory over a distance, and order.

Needs torch; pictures need matplotlib.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("fastattn.compare needs torch: pip install 'fastattn[torch]'") from error

from fastattn.compare.cost import Cost, CostSettings, Memory, Timing, measure_cost, time_layer
from fastattn.compare.layers import KINDS, count_flops, make_layer
from fastattn.compare.order import Order, Ordered, OrderSettings, measure_order
from fastattn.compare.recall import Recall, Recalled, RecallSettings, measure_recall
from fastattn.compare.training import POSITIONS, Progress

__all__ = [
    "KINDS",
    "POSITIONS",
    "Cost",
    "CostSettings",
    "Memory",
    "Order",
    "OrderSettings",
    "Ordered",
    "Progress",
    "Recall",
    "RecallSettings",
    "Recalled",
    "Timing",
    "count_flops",
    "make_layer",
    "measure_cost",
    "measure_order",
    "measure_recall",
    "time_layer",
]
