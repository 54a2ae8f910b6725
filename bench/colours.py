"""Colours of pictures: Okabe and Ito's, which readers who see few colours tell apart too."""

from __future__ import annotations

# Whoever is measured, a colour and a symbol of plotly each; those that never meet may share.
_STYLES = {
    "fastattn": ("#d55e00", "circle"),
    "torch": ("#0072b2", "square"),
    "vllm": ("#009e73", "diamond"),
    "zentorch": ("#e69f00", "triangle-up"),
    "openvino": ("#56b4e9", "triangle-down"),
    "onnxruntime": ("#cc79a7", "cross"),
    "flex": ("#8c6d31", "x"),
    "jax": ("#666666", "star"),
    "eager": ("#666666", "diamond"),
    "sdpa": ("#0072b2", "square"),
    "portable": ("#e69f00", "triangle-up"),
    "portable atomic": ("#8c6d31", "x"),
    "hopper": ("#d55e00", "hexagon"),
    "decode": ("#e69f00", "triangle-up"),
    "cudnn": ("#009e73", "diamond"),
    "flash": ("#0072b2", "square"),
    "insight": ("#d55e00", "circle"),
    "without a value": ("#e69f00", "diamond"),
}
DTYPES = {"float64": "#cc79a7", "float32": "#0072b2", "bfloat16": "#d55e00", "float16": "#e69f00"}
GREY = "#767676"


def style(name: str) -> tuple[str, str]:
    """Colour and symbol of a contestant."""
    return _STYLES.get(name, (GREY, "circle-open"))
