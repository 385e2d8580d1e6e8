"""What an ONNX file takes and returns, before it has a contract."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx

from stepcell.contract import DType
from stepcell.errors import ExportError

__all__ = ["Port", "ports_of"]


@dataclass(frozen=True)
class Port:
    """An input or output of the file.

    Attributes:
        shape: numbers, names of dynamic sizes, and None for a dynamic size without a name; None as
            a whole where the file does not even say the rank.
    """

    name: str
    dtype: DType
    shape: tuple[int | str | None, ...] | None

    def fits(self, other: Port) -> bool:
        """Whether both can be ends of one state: same dtype, same rank, no two numbers that differ."""
        if self.dtype != other.dtype:
            return False
        if self.shape is None or other.shape is None:
            return True
        pairs = list(zip(self.shape, other.shape, strict=False))
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        return len(self.shape) == len(other.shape) and not differ


def ports_of(model: onnx.ModelProto, path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a model, in its order; weights that are listed as inputs are none.

    Raises:
        ExportError: one is no tensor, or of a dtype that a contract does not know.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    inputs = _ports((value for value in model.graph.input if value.name not in weights), path)
    return inputs, _ports(model.graph.output, path)


def _ports(values: Iterable[onnx.ValueInfoProto], path: Path) -> list[Port]:
    ports = []
    for value in values:
        if value.type.WhichOneof("value") != "tensor_type":
            raise ExportError(f"{path}: {value.name}: a step model takes and returns tensors, got a sequence or map")
        tensor = value.type.tensor_type
        known = (
            tensor.elem_type in onnx.TensorProto.DataType.values() and tensor.elem_type != onnx.TensorProto.UNDEFINED
        )
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else "no dtype"
        if dtype not in get_args(DType):
            raise ExportError(f"{path}: {value.name}: expected one of {', '.join(get_args(DType))}, got {dtype}")
        shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
        ports.append(Port(value.name, dtype, shape))  # type: ignore[arg-type]
    return ports


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    return dim.dim_param or None
