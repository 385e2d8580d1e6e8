"""A step model in the precision of the file to export."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from stepcell.contract import StepContract
from stepcell.errors import ExportError
from stepcell.exporter.floats import Floats
from stepcell.exporter.step_onnx.contract import TORCH_DTYPES, example_tensors, sizes_for_check

__all__ = ["in_precision"]

_logger = logging.getLogger(__name__)


def in_precision(model: nn.Module, contract: StepContract) -> nn.Module:
    """The model in float32, or a copy in float16 that takes states of the contract's dtypes.

    Raises:
        ExportError: a weight is beyond the range of float16.
    """
    if contract.precision == "float32":
        return model
    limit = torch.finfo(torch.float16).max
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.abs().max() > limit:
            raise ExportError(
                f"tensor {name}: holds {tensor.abs().max():.3g}, beyond float16's largest value {limit:.0f}",
                hint="export with --precision float32",
            )
    half = copy.deepcopy(model).half()
    tensors = example_tensors(contract, sizes_for_check(contract)[0])
    try:
        with torch.no_grad():
            half(*tensors)
    except RuntimeError:  # float32 states meet float16 weights
        narrow = _NarrowStates(half, contract)
        try:
            with torch.no_grad():
                narrow(*tensors)
        except RuntimeError:  # another fault, which the tracer reports
            return half
        names = ", ".join(state.name for state in contract.states if state.dtype == "float32")
        _logger.info(
            "note: %s: computed by the module's own code, in float16; try --precision float32 if it is too narrow",
            names,
        )
        return narrow
    return half


class _NarrowStates(nn.Module):
    """A float16 step model whose code converts no states: they are float16 inside it, and wide outside."""

    def __init__(self, model: nn.Module, contract: StepContract) -> None:
        super().__init__()
        self.model = model
        self.inputs = len(contract.inputs)
        self.outputs = len(contract.outputs)
        self.dtypes = [TORCH_DTYPES[state.dtype] for state in contract.states]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        states = [state.half() if state.is_floating_point() else state for state in tensors[self.inputs :]]
        with Floats(torch.float16):
            results = self.model(*tensors[: self.inputs], *states)
        wide = [new.to(dtype) for new, dtype in zip(results[self.outputs :], self.dtypes, strict=True)]
        return (*results[: self.outputs], *wide)
