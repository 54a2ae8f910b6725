"""torch tensors, seen as strided memory, wherever that is, and turned. torch is handed in, never imported."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastattn.strided import Array, Strided, contiguous, not_a_plain, not_on


class _TorchTensors:
    """Tensors on the CPU."""

    on_host = True

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._strided = torch.strided
        self._forward_ad = torch.autograd.forward_ad
        self._plain = (torch.Tensor, torch.nn.Parameter)

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        self._check_kind(name, array)
        self._check_device(name, array)
        if array.requires_grad or self._forward_ad._current_level >= 0:
            self._check_no_graph(name, array, to_write)
        if array.is_neg():  # lazily negated, as the imaginary part of a conjugate: memory has the other sign
            if to_write:
                raise ValueError(f"{name} must be writable, got a lazily negated view: see resolve_neg")
            array = array.resolve_neg()
        try:
            shape, strides, address = tuple(array.shape), array.stride(), array.data_ptr()
        except RuntimeError as error:  # nested tensors, and the wrappers inside torch.func transforms
            raise RuntimeError(f"{name} is no single block of memory: {error}") from error
        if not address and array.numel():
            raise RuntimeError(f"{name} is no single block of memory: it has no storage")
        if to_write and not array.is_inference():
            # As torch's own in-place operations do: a graph that saved these values then refuses to use them.
            self._torch.autograd.graph.increment_version(array)
        return Strided(array, _torch_name(array.dtype), shape, strides, address)

    def _check_kind(self, name: str, array: Array) -> None:
        if type(array) not in self._plain:
            raise not_a_plain("a torch tensor", self._torch.Tensor, name, array)
        if array.layout is not self._strided:
            raise TypeError(f"{name} must be a dense tensor (torch.strided), got layout {array.layout}")

    def _check_device(self, name: str, array: Array) -> None:
        if not array.is_cpu:
            raise not_on("cpu", name, array)

    def _check_no_graph(self, name: str, array: Array, to_write: bool) -> None:
        dual = (
            self._forward_ad._current_level >= 0 and self._forward_ad.unpack_dual(array).tangent is not None
        )
        if not dual and not (array.requires_grad and self._torch.is_grad_enabled()):
            return
        if to_write:
            raise RuntimeError(f"{name} requires grad, and would be overwritten: pass {name}.detach()")
        raise RuntimeError(
            f"{name} requires grad, and this call computes no gradient of it: "
            f"call it under torch.no_grad(), or pass {name}.detach()"
        )

    def readable(self, name: str, array: Array) -> Strided:
        return self.view(name, array)

    def keeps(self, array: Array) -> bool:
        return False

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        if _torch_name(like.dtype) == dtype:
            tensor = like.new_empty(shape)
        else:
            tensor = like.new_empty(shape, dtype=getattr(self._torch, dtype))
        return Strided(tensor, dtype, shape, contiguous(shape), tensor.data_ptr())

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Array) -> Strided:
        view = self.empty(shape, dtype, like)
        view.array.zero_()
        return view

    def draw_seed(self, like: Array) -> Any:
        return int(self._torch.randint(2**63 - 1, (), device=like.device))


class _DeviceTensors(_TorchTensors):
    """Tensors on one GPU. Python launches what reads them and never reads them itself, which would wait."""

    on_host = False

    def __init__(self, torch: Any, device: Any) -> None:
        super().__init__(torch)
        self._device = device

    def _check_device(self, name: str, array: Array) -> None:
        if array.device != self._device:
            raise not_on(self._device, name, array)

    def readable(self, name: str, array: Array) -> Strided:
        self._check_kind(name, array)
        return on_host(self._torch).view(name, array.detach().cpu())

    def keeps(self, array: Array) -> bool:
        if not isinstance(array, self._torch.Tensor):
            return False
        return array.device == self._device or not array.is_cpu  # on another GPU: `view` says that it is

    def draw_seed(self, like: Array) -> Any:
        return self._torch.randint(2**63 - 1, (), device=like.device)


class _TorchOperands(_TorchTensors):
    """Tensors that torch itself computes on: any device, any graph. No memory is read through the view."""

    on_host = False

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        self._check_kind(name, array)
        if to_write:
            self._check_no_graph(name, array, to_write)
        try:
            shape, strides = tuple(array.shape), array.stride()
        except RuntimeError as error:  # nested tensors
            raise RuntimeError(f"{name} is no single block of memory: {error}") from error
        try:
            address = array.data_ptr()  # only overlaps are told from it
        except RuntimeError:  # the wrappers inside torch.func transforms
            address = 0
        return Strided(array, _torch_name(array.dtype), shape, strides, address)

    def readable(self, name: str, array: Array) -> Strided:
        self._check_kind(name, array)
        if self._forward_ad._current_level >= 0:
            array = self._forward_ad.unpack_dual(array).primal
        array, functorch = array.detach().cpu(), self._torch._C._functorch
        while functorch.is_gradtrackingtensor(array):  # inside torch.func.grad, jvp and their like
            array = functorch.get_unwrapped(array)
        with self._torch.no_grad():
            return super().view(name, array)


class _TorchDescriptions(_DeviceTensors):
    """Tensors of which only type, dtype, shape and device are there, as in a trace; sizes may be symbols."""

    def view(self, name: str, array: Array, *, to_write: bool = False) -> Strided:
        if not isinstance(array, self._torch.Tensor):
            raise not_a_plain("a torch tensor", self._torch.Tensor, name, array)
        self._check_device(name, array)
        return Strided(array, _torch_name(array.dtype), tuple(array.shape), tuple(array.stride()), 0)


def turned(torch: Any, columns: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotary embedding: pairs of columns turned by their angles, neighbours or a column of each half."""
    first, second = (columns[..., 0::2], columns[..., 1::2]) if interleaved else columns.chunk(2, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    return torch.stack(pair, -1 if interleaved else -2).flatten(-2)


@cache
def _torch_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


on_host = cache(_TorchTensors)
on_device = cache(_DeviceTensors)
operands = cache(_TorchOperands)
descriptions = cache(_TorchDescriptions)
