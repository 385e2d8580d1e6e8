"""The fused gate kernel as a TensorRT plugin: what a device can be told about it today."""

from __future__ import annotations

__all__ = ["plugin_unavailable"]


def plugin_unavailable(flavor: str) -> str:
    """Why the fused plugin cannot be used with a TensorRT flavour, in one sentence.

    Args:
        flavor: "tensorrt" or "tensorrt-rtx".
    """
    if flavor == "tensorrt-rtx":
        return "TensorRT-RTX has no way to host a custom plugin; recurrent cells run as its own layers"
    return "this version of stepcell brings no fused plugin yet; recurrent cells run as TensorRT's own layers"
