"""Reader of ONNX files that have no contract yet: weights, inputs and outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from stepcell.contract import DType
from stepcell.errors import ExportError, UsageError
from stepcell.external_weights import ONE_FILE, has_external_weights, load_external_weights, tensors_of
from stepcell.onnx_model import contract_text, read_model, repair_hint
from stepcell.onnx_rewrite import sort_nodes, use_time_first

__all__ = ["Array", "OnnxFile", "Port", "read_onnx_file"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Port:
    """An input or output of the file.

    Attributes:
        shape: numbers, names of dynamic sizes, and None for a dynamic size without a name; None
            instead of a tuple where the file does not give the rank.
    """

    name: str
    dtype: DType
    shape: tuple[int | str | None, ...] | None

    @property
    def has_elements(self) -> bool:
        """Whether it is more than a single number, such as a threshold."""
        return self.shape is None or any(size != 1 for size in self.shape)

    def becomes(self, other: Port) -> bool:
        """Whether both can be ends of one state once the other, its next value, is reshaped, or this one broadcast.

        The two have the same sizes above 1 and at most one that is not known, or this one is a single number.
        """
        if self.fits(other):
            return True
        if self.dtype != other.dtype or self.shape is None or other.shape is None:
            return False
        if not self.has_elements:
            return len(self.shape) == len(other.shape) > 0
        mine, theirs = ([size for size in shape if size != 1] for shape in (self.shape, other.shape))
        unknown = sum(not isinstance(size, int) for size in mine)
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(mine, theirs, strict=False))
        return len(mine) == len(theirs) and unknown <= 1 and not differ

    def fits(self, other: Port) -> bool:
        """Whether both can be ends of one state: same dtype, same rank, no two numbers that differ."""
        if self.dtype != other.dtype:
            return False
        if self.shape is None or other.shape is None:
            return True
        pairs = list(zip(self.shape, other.shape, strict=False))
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        return len(self.shape) == len(other.shape) and not differ


@dataclass(frozen=True)
class OnnxFile:
    """A file as it was read.

    Attributes:
        data: the model with all its weights.
        sha256: of the file.
        model: the same, its nodes in order and its recurrent nodes in the default layout.
        notes: for a person, what was rewritten on reading.
    """

    path: Path
    data: bytes
    sha256: str
    model: onnx.ModelProto
    inputs: list[Port]
    outputs: list[Port]
    notes: tuple[str, ...] = ()

    @property
    def opset(self) -> int:
        return next((int(item.version) for item in self.model.opset_import if item.domain in ("", "ai.onnx")), 0)

    @property
    def precision(self) -> Literal["float16", "float32"]:
        """The dtype of most weights, by number of elements."""
        sizes: dict[int, int] = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
        for tensor in tensors_of(self.model):
            if tensor.data_type in sizes:
                sizes[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
        return "float16" if sizes[onnx.TensorProto.FLOAT16] > sizes[onnx.TensorProto.FLOAT] else "float32"


def read_onnx_file(path: Path, *, with_contract: bool = False) -> OnnxFile:
    """Read a file, and the weights that are stored beside it.

    Args:
        with_contract: take a file that has a contract, which is not read.

    Raises:
        InputError: it or its weights cannot be read, or it is not an ONNX model.
        UsageError: it has a contract already.
        ExportError: its inputs and outputs are not tensors.
    """
    data, model = read_model(path)
    if contract_text(model) is not None and not with_contract:
        raise UsageError(
            f"{path}: has a state contract already",
            hint="`stepcell build` and `run` take it as it is; `fuse` changes what it says of pixels (--range 0,1) "
            f"and of values (--value k=3); if another tool changed it: {repair_hint(path)}",
        )
    digest = hashlib.sha256(data).hexdigest()
    if has_external_weights(model):
        load_external_weights(model, path, limit=ONE_FILE)
        data = model.SerializeToString()
    recurrent = use_time_first(model)
    if sort_nodes(model) or recurrent:
        data = model.SerializeToString()
    notes = [f"layout=1 of {', '.join(recurrent)} is rewritten with transposes"] if recurrent else []
    inputs, outputs = _ports_of(model, path)
    return OnnxFile(path, data, digest, model, inputs, outputs, tuple(notes))


def _ports_of(model: onnx.ModelProto, path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a model, in its order, without weights that are listed as inputs.

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
