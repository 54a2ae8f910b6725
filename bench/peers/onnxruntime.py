"""ONNX Runtime: the operator MultiHeadAttention of its contrib set, inputs and output bound in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers.base import MASKED, OFFSET_CAUSAL, Call, Peer, Run, register
from tests.shapes import Case


@register
class OnnxRuntime(Peer):
    name = "onnxruntime"
    library = "numpy"
    dtypes = ("float32", "float16")
    does = MASKED - {OFFSET_CAUSAL} | {"values of another size"}

    def load(self, threads: int) -> str:
        import onnx  # noqa: F401  # builds the model
        import onnxruntime

        self.threads = threads
        version: str = onnxruntime.__version__
        return version

    def prepare(self, call: Call) -> Run:
        import onnxruntime

        inputs = {name: _packed(getattr(call, name)) for name in ("query", "key", "value")}
        causal, mask, added = call.rules()
        if mask is not None:
            added = np.where(mask, 0, -np.inf)
        if added is not None:
            inputs["bias"] = np.ascontiguousarray(added.astype(call.query.dtype))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        model = _model(call.case, inputs, causal)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        shape = [call.case.batch, call.case.seqlen_q, call.case.query_heads * call.case.value_dim]
        out = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, call.query.dtype.type)
        binding.bind_ortvalue_output("out", out)

        def run() -> Any:
            session.run_with_iobinding(binding)
            return out

        return run

    def read(self, result: Any, case: Case) -> np.ndarray:
        out: np.ndarray = result.numpy().astype(np.float64)
        return out.reshape(case.batch, case.seqlen_q, case.query_heads, case.value_dim).swapaxes(1, 2)


def _packed(array: np.ndarray) -> np.ndarray:
    """(B, H, L, D) as (B, L, H * D)."""
    batch, heads, length, dim = array.shape
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, length, heads * dim)


def _model(case: Case, inputs: dict[str, np.ndarray], causal: bool) -> bytes:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(inputs["query"].dtype)
    names = ["query", "key", "value", *(["", "", "bias"] if "bias" in inputs else [])]
    node = helper.make_node(
        "MultiHeadAttention", names, ["out"], domain="com.microsoft",
        num_heads=case.query_heads, unidirectional=int(causal),
    )  # fmt: skip
    given = [helper.make_tensor_value_info(name, kind, array.shape) for name, array in inputs.items()]
    out = helper.make_tensor_value_info("out", kind, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", given, [out])
    # Onnxruntime reads no newer format than the one of its own release.
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised
