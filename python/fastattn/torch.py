"""fastattn's operators in torch: importing this registers ``torch.ops.fastattn``.

`fastattn` does so itself where torch is loaded before it, and at the first tensor otherwise. A process that
only runs exported or saved graphs, which name the operators, imports this.
"""

from fastattn import torch_ops as _registered  # noqa: F401
