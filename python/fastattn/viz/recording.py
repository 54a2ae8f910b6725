"""What a model looks at: the attention of each of its layers, recorded while the model runs.

>>> from fastattn import viz
>>> with viz.record(model, tokens=tokens) as recording:
...     output = model(**inputs)
>>> recording.layers[0].weights.shape
(1, 12, 9, 9)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn.insights import Insight
from fastattn.problem import AttentionProblem
from fastattn.vectors import check_integer
from fastattn.viz._captured import captured

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Layer", "Recording", "record"]

Module: TypeAlias = Any  # torch.nn.Module; torch is not imported for an annotation


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of one layer's attention: Lq queries looking at Lk keys, in B sequences and H query heads.

    Attributes
    ----------
    name : str
        Of the module that attends, as in ``model.named_modules()``; the class of a model that does so itself.
    weights : float32 array, shape (B, H, Lq, Lk), or None
        The probabilities, before dropout. Rows sum to 1, less the share of a sink; to 0 where nothing may be
        attended to. None for more than `dense_up_to` queries or keys.
    insight : fastattn.Insight or None
        The strongest keys of each query, entropies and the mass of each key, where there are no weights.
    causal : bool
        Whether no query looks at a key behind its own position.
    call : int
        How many calls of this name came before: a step of generation, for one.
    """

    name: str
    weights: NDArray[np.float32] | None
    insight: Insight | None
    causal: bool
    call: int = 0


@dataclass(eq=False)
class Recording:
    """What `record` saw.

    Attributes
    ----------
    layers : list of Layer
        In the order in which they were computed.
    tokens : list of str or None
        As they were given to `record`, for pictures.
    """

    tokens: list[str] | None = None
    layers: list[Layer] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The layers that attended, each once."""
        return list(dict.fromkeys(layer.name for layer in self.layers))

    def select(self, name: str | None = None, call: int | None = None) -> list[Layer]:
        """Return the layers of this name, and of this call; None: of any.

        Raises
        ------
        KeyError
            If there is none.
        """
        found = [
            layer
            for layer in self.layers
            if (name is None or layer.name == name) and (call is None or layer.call == call)
        ]
        if not found:
            calls = 1 + max((layer.call for layer in self.layers), default=-1)
            raise KeyError(f"no layer {name!r} in call {call}; there are {self.names} in {calls} calls")
        return found


@contextmanager
def record(
    model: Module, *, tokens: Sequence[str] | None = None, dense_up_to: int = 512, top_k: int = 16
) -> Iterator[Recording]:
    """Record the attention of a model, layer by layer, while a block runs.

    Seen is what fastattn computes (`fastattn.nn`, `fastattn.attention` and its kin, ``patch_sdpa``,
    ``attn_implementation="fastattn"`` with any cache) and what goes through
    ``torch.nn.functional.scaled_dot_product_attention`` (`torch.nn.MultiheadAttention`, the ``"sdpa"`` of
    transformers). Nothing is changed: kernels run as they would, and the weights, which they do not have, are
    computed beside them from query, key and masks, in float32 (float64 for float64). Calls on a GPU are
    copied and waited for.

    Parameters
    ----------
    model : torch.nn.Module
        Not compiled: compiled code calls no function that could be seen.
    tokens : sequence of str, optional
        What the keys are, for pictures.
    dense_up_to : int
        Calls with more queries or keys than this are kept as `fastattn.insight` has them, without the
        (Lq, Lk) weights, which take 4 bytes times ``B * H * Lq * Lk`` a layer.
    top_k : int
        Keys a query that are then kept.

    Yields
    ------
    Recording
        Filled as the model runs, with arrays of NumPy.

    Raises
    ------
    TypeError
        For a `model` that is no module of torch, or a compiled or scripted one, and numbers that are none.
    ValueError
        For a model of transformers with eager attention, which calls no function that could be seen, and
        numbers out of range.
    RuntimeError
        At the end of a block in which no attention of the model was seen.
    NotImplementedError
        From the model, for nested tensors and in transforms of ``torch.func``.

    Notes
    -----
    The block sees calls of its own thread or asyncio task. Blocks may be nested. Code that took
    ``scaled_dot_product_attention`` out of ``torch.nn.functional`` before fastattn was loaded is not seen.
    torch's native fast paths for inference, in which attention cannot be seen, are declined in the block: the
    output of `torch.nn.TransformerEncoder` may differ in its last bits, and at padding.

    Examples
    --------
    >>> import torch
    >>> from fastattn import viz
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    >>> with viz.record(model) as recording, torch.no_grad():
    ...     out = model(torch.randn(1, 5, 16))
    >>> [(layer.name, layer.weights.shape) for layer in recording.layers]
    [('self_attn', (1, 2, 5, 5))]
    """
    check_integer("dense_up_to", dense_up_to, least=0)
    check_integer("top_k", top_k, least=1)
    if isinstance(tokens, str):
        raise TypeError("tokens: expected a sequence of strings, one a token, got one string")
    _check_model(model)
    from fastattn.integrations.torch_sdpa_patch import observed

    recording = Recording(None if tokens is None else list(tokens))
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    calls: Counter[str] = Counter()

    def keep(problem: AttentionProblem) -> None:
        name = _attending(names)
        if name is not None:
            recording.layers.append(Layer(name, *captured(problem, dense_up_to, top_k), calls[name]))
            calls[name] += 1

    with observed(keep):
        yield recording
    if not recording.layers:
        raise RuntimeError(
            "record saw no attention of the model in this block, and in this thread: it sees what goes "
            "through fastattn or torch.nn.functional.scaled_dot_product_attention, not flash_attn, "
            "flex_attention or attention that a module writes out"
        )


def _attending(names: dict[int, str]) -> str | None:
    """Name the innermost of these modules that is being called; None if none of them is.

    The frames of the interpreter say so for each thread, and need no hook that would have to be removed.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return name
        frame = frame.f_back
    return None


def _check_model(model: Any) -> None:
    """Raise for what would run unseen."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            kind = "compiled" if compiled else "scripted"
            raise TypeError(
                f"model must run as Python, got a {kind} module {name!r}: record the module it is made of"
            )
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager":
            raise ValueError(
                "model must not use eager attention, which cannot be seen: call "
                "model.set_attn_implementation('sdpa'), or 'fastattn' after "
                "fastattn.integrations.transformers.register()"
            )
