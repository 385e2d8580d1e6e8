"""The fused gate kernel as a TensorRT plugin.

kernels/ computes; step.py runs one step; plugin.py and registry.py are TensorRT's view of it, fields.py
what a plan carries, nodes.py how the ONNX node becomes the plugin's. docs/plugin.md tells the whole.
"""

from __future__ import annotations

from typing import Any

__all__ = ["plugin_unavailable"]


def plugin_unavailable(flavor: str, module: Any = None) -> str:
    """Why the fused plugin cannot be used with a TensorRT flavour, in one sentence; empty: it can.

    Args:
        flavor: "tensorrt" or "tensorrt-rtx".
        module: the vendor's module, where it is to be asked too.
    """
    if flavor == "tensorrt-rtx":
        return "TensorRT-RTX has no way to host a custom plugin; recurrent cells run as its own layers"
    if module is not None and not hasattr(module.INetworkDefinition, "add_plugin_v3"):
        needs = f"TensorRT {module.__version__} cannot host the plugin, which needs 10.0 or later"
        return f"{needs}; recurrent cells run as its own layers"
    return ""
