"""OpenVINO's CPU plugin: opset13 scaled_dot_product_attention, compiled for the precision asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers.base import MASKED, OFFSET_CAUSAL, Call, Peer, Run, register
from tests.shapes import Case

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@register
class OpenVino(Peer):
    name = "openvino"
    library = "numpy"
    does = MASKED - {OFFSET_CAUSAL} | {"values of another size"}

    def load(self, threads: int) -> str:
        import openvino

        self.threads = threads
        self.core = openvino.Core()
        return str(openvino.__version__).split("-")[0]

    def prepare(self, call: Call) -> Run:
        import openvino
        from openvino import opset13

        inputs = [call.query, call.key, call.value]
        causal, mask, added = call.rules()
        if added is not None:
            mask = added.astype(call.query.dtype)
        if mask is not None:
            inputs.append(np.ascontiguousarray(mask))
        kinds = [openvino.Type.boolean if x.dtype == bool else _kind(call.dtype) for x in inputs]
        parameters = [opset13.parameter(list(x.shape), kind) for x, kind in zip(inputs, kinds, strict=True)]
        node = opset13.scaled_dot_product_attention(*parameters, causal=causal)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[call.dtype],
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = self.core.compile_model(openvino.Model([node], parameters), "CPU", settings)
        request = compiled.create_infer_request()
        for index, (array, kind) in enumerate(zip(inputs, kinds, strict=True)):
            tensor = openvino.Tensor(kind, openvino.Shape(array.shape))
            bits = f"u{array.itemsize}"  # OpenVINO shows bfloat16 as another type of its size
            tensor.data.view(bits)[...] = np.ascontiguousarray(array).view(bits)
            request.set_input_tensor(index, tensor)

        def run() -> Any:
            request.infer()
            return request

        return run

    def read(self, result: Any, case: Case) -> np.ndarray:
        tensor = result.get_output_tensor(0)
        out: np.ndarray = tensor.data
        if tensor.element_type == _kind("bfloat16"):
            import ml_dtypes

            out = out.view(np.uint16).view(ml_dtypes.bfloat16)
        return out.astype(np.float64)


def _kind(dtype: str) -> Any:
    import openvino

    return getattr(openvino.Type, HINTS[dtype])
