"""The attention of a model that is built already, handed to fastattn."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fastattn.nn._common import check_backend
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

Model = TypeVar("Model", bound=nn.Module)

_DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}


def convert(model: Model, *, backend: str | None = None) -> Model:
    """Let fastattn compute the attention of a model that is built of `torch.nn`, in place.

    Every `torch.nn.MultiheadAttention`, `torch.nn.TransformerEncoderLayer` and
    `torch.nn.TransformerDecoderLayer` in it becomes the drop-in of that name. Modules stay the objects that
    they are, with their parameters, hooks and mode: optimizers, references and pruning stay valid. Subclasses
    are left alone, since they may compute something else; a parametrized module is one.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be one of the three. Compile it after, not before.
    backend : str, optional
        As of `fastattn.attention`.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is no module, or `backend` no name.
    ValueError
        If there is nothing to convert in `model`, and nothing that is converted already.

    Examples
    --------
    >>> import torch
    >>> from fastattn.nn import convert
    >>> layer = torch.nn.TransformerEncoderLayer(64, 8, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(layer, num_layers=2)
    >>> type(convert(encoder).layers[0])
    <class 'fastattn.nn.transformer.TransformerEncoderLayer'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    modules = list(model.modules())
    if not any(type(module) in _DROP_INS or isinstance(module, (*_DROP_INS.values(),)) for module in modules):
        names = ", ".join(kind.__name__ for kind in _DROP_INS)
        raise ValueError(f"model must have a module of torch.nn to convert ({names}), got none")
    for module in modules:
        if drop_in := _DROP_INS.get(type(module)):
            # The drop-ins add methods and no state, so that another class is all that a module needs.
            module.__class__ = drop_in
            if isinstance(module, MultiheadAttention):
                module.backend = backend
    return model
