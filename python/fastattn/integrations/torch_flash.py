"""fastattn as the flash attention of torch's CPU dispatcher, under torch's own registry.

>>> import torch
>>> from fastattn.integrations.torch_flash import register
>>> register()
>>> torch.nn.attention.activate_flash_attention_impl("fastattn")
>>> torch.nn.attention.restore_flash_attention_impl()

While it is active, fastattn computes every ``scaled_dot_product_attention`` on the CPU that torch would give
to its flash attention, in all threads: of code that imported the function by name, of compiled graphs and of
C++ as well. Torch's kernel computes the gradients, from the log-sum-exp that fastattn hands it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import attention

_NAME = "_scaled_dot_product_flash_attention_for_cpu"


def register(name: str = "fastattn") -> None:
    """Enter fastattn into the registry, for ``torch.nn.attention.activate_flash_attention_impl(name)``.

    Parameters
    ----------
    name : str
        What it is to be called there.

    Raises
    ------
    RuntimeError
        If this torch has no such registry, or cannot tell its own kernel.
    """
    missing = [
        f"{module.__name__}.{function}"
        for module, function in (
            (torch.nn.attention, "register_flash_attention_impl"),
            (torch.library, "get_kernel"),
        )
        if not hasattr(module, function)
    ]
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__} has no {' and no '.join(missing)}: use fastattn.patch_sdpa"
        )
    torch.nn.attention.register_flash_attention_impl(name, register_fn=_Registration)


class _Registration:
    """The kernel in the dispatcher, as long as this lives and is not removed."""

    def __init__(self) -> None:
        own = torch.library.get_kernel(f"aten::{_NAME}", "CPU")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

        def forward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            *,
            attn_mask: Tensor | None = None,
            scale: float | None = None,
        ) -> Any:
            try:
                return _forward(query, key, value, dropout_p, is_causal, attn_mask, scale)
            except (
                NotImplementedError,
                ValueError,
            ):  # no kernel for it, or nothing that fastattn calls attention
                options = {"attn_mask": attn_mask, "scale": scale}
                return own.call_boxed(keys, query, key, value, dropout_p, is_causal, **options)

        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():  # that torch's kernel is overridden is what was asked for
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            self._library.impl(_NAME, forward, "CPU", allow_override=True)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Give the operator back to torch."""
        self._library = None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute out, (B, H, L, D), and lse, (B, H, L), with the strides that torch promises."""
    arguments: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    if mask is not None:
        arguments["mask" if mask.dtype is torch.bool else "bias"] = mask
    with torch.no_grad():  # autograd is above the dispatcher's CPU kernels
        causal: Any = "top_left" if is_causal else False
        out, lse = attention(
            query, key, value, causal=causal, out=torch.empty_like(query), return_lse=True, **arguments
        )
    lse = lse.masked_fill(lse == -torch.inf, 0)  # torch's backward subtracts it, from -inf
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)
