"""Wrappers around a module: compiled, parallel and scripted ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stepcell.errors import UsageError

__all__ = ["plain_module"]


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, also around its parts.

    Raises:
        UsageError: it is TorchScript, whose compiled code torch's exporter does not read.
    """
    module = _unwrapped(module)
    scripted = next((each for each in module.named_modules() if isinstance(each[1], torch.jit.ScriptModule)), None)
    if scripted is not None:
        name = getattr(scripted[1], "original_name", type(scripted[1]).__name__)
        raise UsageError(
            f"{scripted[0] or name}: a TorchScript module holds compiled code, which cannot be traced",
            hint="give its Python class, with the weights saved by torch.save(torch.jit.load('net.pt').state_dict(), "
            "'net.pth'); without the class, torch.onnx.export(..., dynamo=False) with the states as arguments, and "
            "`stepcell fuse`",
        )
    for path, child in list(module.named_modules()):
        if path and (inner := _unwrapped(child)) is not child:
            module.set_submodule(path, inner)
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
