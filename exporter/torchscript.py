"""What to do with TorchScript, whose compiled code cannot be traced."""

from __future__ import annotations

from pathlib import Path

__all__ = ["torchscript_hint"]


def torchscript_hint(file: str) -> str:
    """How the weights in a file of TorchScript become a step model, and what there is without the Python class."""
    weights = f"{Path(file).stem}-weights.pth"
    return (
        f'write its weights alone:\n  module = torch.jit.load("{file}", map_location="cpu")\n'
        f'  torch.save(module.state_dict(), "{weights}")\n'
        f"and export them with the Python class they were trained in: stepcell export {weights} --module "
        "package.module:Class --shape x:1x3x64x64 (a family of --list-families needs neither). Without the class: "
        "torch.onnx.export(module, ..., dynamo=False) with the states as arguments, then stepcell fuse; "
        "docs/own-module.md, TorchScript"
    )
