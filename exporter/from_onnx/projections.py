"""LSTM layers whose projection the exporter lost."""

from __future__ import annotations

from stepcell.errors import ExportError
from stepcell.exporter.from_onnx.onnx_file import OnnxFile

__all__ = ["refuse_projections"]

_INITIAL_C = 6


def refuse_projections(file: OnnxFile) -> None:
    """ONNX has no LSTM with a projection (`proj_size`), and torch writes one as an LSTM of the projected size.

    Raises:
        ExportError: an LSTM has a cell state of more features than its `hidden_size`: it runs nowhere.
    """
    sizes = {tensor.name: list(tensor.dims) for tensor in file.model.graph.initializer}
    for value in (*file.model.graph.input, *file.model.graph.value_info):
        sizes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    for node in file.model.graph.node:
        if node.op_type != "LSTM" or node.domain or len(node.input) <= _INITIAL_C:
            continue
        hidden = next((attribute.i for attribute in node.attribute if attribute.name == "hidden_size"), 0)
        features = (sizes.get(node.input[_INITIAL_C]) or [0])[-1]
        if hidden and features > hidden:
            raise ExportError(
                f"{file.path}: LSTM {node.name}: its cell state has {features} features, and hidden_size is {hidden}: "
                "an LSTM with a projection (proj_size), which ONNX does not have; torch drops it and writes weights "
                "that fit nothing",
                hint="`stepcell export --module package.module:Class` takes the module itself and keeps the projection",
            )
