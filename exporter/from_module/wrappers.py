"""Wrappers around a module: compiled, parallel and scripted ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stepcell.errors import ExportError
from stepcell.exporter.torchscript import torchscript_hint

__all__ = ["plain_module"]


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, also around its parts.

    Raises:
        ExportError: it is TorchScript, whose compiled code torch's exporter does not read.
    """
    module = _unwrapped(module)
    scripted = next((each for each in module.named_modules() if isinstance(each[1], torch.jit.ScriptModule)), None)
    if scripted is not None:
        name = getattr(scripted[1], "original_name", type(scripted[1]).__name__)
        raise ExportError(
            f"{scripted[0] or name}: a TorchScript module holds compiled code, which cannot be traced",
            hint=torchscript_hint("net.pt"),
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
