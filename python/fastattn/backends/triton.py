"""Kernels for GPUs, by Triton: which calls they take, and what they are launched with."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fastattn._flags import interprets
from fastattn.arrays import NUMPY
from fastattn.cache_problem import CacheUpdate
from fastattn.outputs import Gradients, Outputs
from fastattn.problem import AttentionProblem

if TYPE_CHECKING:
    import torch

MAX_HEAD_DIM = 256  # of keys and of values: a tile of each has to fit into shared memory
NO_GPU = "torch finds no GPU that it can use"
MIN_CAPABILITY = (8, 0)  # of GPUs by NVIDIA: the first that multiply bfloat16


class TritonBackend:
    """Triton's kernels on a GPU; under ``TRITON_INTERPRET=1`` in its interpreter, on the CPU."""

    name = "triton"

    def supports(self, problem: AttentionProblem) -> list[str]:
        """Name the place, the package, the dtype or the size for which there is no kernel."""
        if problem.library is NUMPY:
            return ["NumPy arrays are not on a GPU: pass CUDA tensors"]
        device = problem.query.array.device
        if device.type == "cpu" and not interprets():
            return ["the tensors are on the CPU: pass CUDA tensors"]
        reasons = missing(device)
        if problem.dtype == "float64":
            reasons.append("no kernel computes float64 on a GPU: see backend='math'")
        for whose, view in ("", problem.query), ("value's ", problem.value):
            if view.shape[3] > MAX_HEAD_DIM:
                reasons.append(
                    f"{whose}head dimension {view.shape[3]} is more than {MAX_HEAD_DIM}: "
                    "see backend='math', or the kernels for tensors on the CPU"
                )
        return reasons

    def run(self, problem: AttentionProblem, outputs: Outputs) -> None:
        """Launch kernels on the current stream of the device."""
        from fastattn.gpu import launch

        launch.forward(problem, outputs)

    def update_cache(self, problem: AttentionProblem, update: CacheUpdate) -> AttentionProblem:
        """Launch a kernel on the current stream of the device."""
        from fastattn.gpu import launch

        return launch.update_cache(problem, update)

    def run_backward(
        self, problem: AttentionProblem, outputs: Outputs, incoming: Outputs, gradients: Gradients
    ) -> None:
        """Launch kernels on the current stream of the device."""
        from fastattn.gpu import launch

        launch.backward(problem, outputs, incoming, gradients)

    def describe(self, problem: AttentionProblem) -> dict[str, str]:
        """Tell the device, the kernel and its tiles, and why it is not another one."""
        from fastattn.gpu import launch

        return {"device": device_name(problem.query.array.device), **launch.described(problem)}


def missing(device: torch.device) -> list[str]:
    """Why no kernel can run on `device` whatever the call; empty if some can."""
    return [reason for reason in (_missing_package(), _missing_capability(device)) if reason]


def serves(device: torch.device) -> bool:
    """Whether the CPU's kernels or these run on `device`."""
    return device.type == "cpu" or (device.type == "cuda" and not missing(device))


# Compilers of torch call it and keep the answer, rather than look into it.
serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """Name a GPU and what it is capable of; the interpreter where there is none."""
    if device.type != "cuda":
        return "Triton's interpreter, on the CPU"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


@cache
def _missing_package() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not there ({error}): pip install 'fastattn[triton]'"
    return ""


@cache
def _missing_capability(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return ""
    if not torch.cuda.is_available():  # and tensors that are but described, in a trace
        return NO_GPU
    if torch.version.hip:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return ""
    found, needed = (f"{major}.{minor}" for major, minor in (capability, MIN_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}, expected {needed} or more"
