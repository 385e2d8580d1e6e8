"""State contract: names, shapes and dtypes of the inputs, outputs and states of a step model.

The exporter writes it as one JSON document into the ONNX file (metadata key `stepcell.contract`), and the builder into
the sidecar of the engine. The step loop connects states by it alone. docs/contract.md describes every field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.contract_check import check_contract
from stepcell.dims import LARGEST, Dim, bind, resolve, symbols_of
from stepcell.errors import ContractError, InputError
from stepcell.event_spec import EventSpec
from stepcell.json_text import decode_json
from stepcell.nv12 import nv12_fault, nv12_of
from stepcell.ops import Gates, Reset
from stepcell.pixels import ChannelOrder, PixelConversion
from stepcell.quantization import Quantization
from stepcell.seal import ZEROS, check_seal, sealed

__all__ = [
    "METADATA_KEY",
    "SCHEMA",
    "STATE_IN",
    "STATE_OUT",
    "CellSpec",
    "DType",
    "InitialValue",
    "Parity",
    "Spec",
    "StateSpec",
    "StepContract",
    "TensorSpec",
    "state_names",
]

SCHEMA = "1.1"
METADATA_KEY = "stepcell.contract"
# Prefixes, not suffixes: inputs and outputs then sort in the same order, and Triton Inference Server, which pairs
# states by sorted name, pairs them correctly.
STATE_IN = "state_in."
STATE_OUT = "state_out."

DType = Literal["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool"]
_CHECKSUM = b'"checksum": "'  # the last field of a sealed document


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A data input or output.

    Attributes:
        name: in the model.
        shape: numbers, symbols or expressions of symbols (see `stepcell.dims`).
        dtype: element type.
        layout: order of the axes, for example "NCHW"; None: the axes have no names.
        range: values of a black and a white pixel that the model was trained on; None: undefined, and no pixels are
            fed to it. Bytes are pixels as they are, booleans 0 and 1, unless it says something else.
        mean: per channel of the tensor, in units of `range`, subtracted after scaling to it, or None.
        std: per channel, divided by after that, or None.
        channels: order of three channels; None: RGB, or the tensor is no picture of three.
        pad_multiple: height and width are padded up to a multiple of this before the step.
        events: how the tensor is computed from the events of an event camera; unset: it is not.
        value: of an input: what a step takes that is not given one, in C order; a single number fills the tensor.
            Unset: every step needs the input.
        batch_axis: number of the axis that counts streams; None: it has none, and all streams share the tensor. Unset:
            the first axis of the size that the states' batch axes have.
        converts: of bytes: what the graph itself converts them to, or from; unset: it does not.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: DType = "float32"
    layout: str | None = None
    range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: ChannelOrder | None = None
    pad_multiple: int = 1
    events: EventSpec | msgspec.UnsetType = msgspec.UNSET
    value: tuple[float | int | bool, ...] | msgspec.UnsetType = msgspec.UNSET
    batch_axis: int | msgspec.UnsetType | None = msgspec.UNSET
    converts: PixelConversion | msgspec.UnsetType = msgspec.UNSET

    def filled(self, shape: Sequence[int]) -> NDArray[Any]:
        """The array of `value`; raises ContractError where there is none, or it does not fit `shape`."""
        numbers = () if isinstance(self.value, msgspec.UnsetType) else self.value
        if len(numbers) not in (1, math.prod(shape)) or not numbers:
            raise ContractError(f"{self.name}: a value of {len(numbers)} numbers does not fit {tuple(shape)}")
        array = np.array(numbers, self.dtype)
        return np.full(shape, array[0]) if len(numbers) == 1 else array.reshape(shape)


class InitialValue(msgspec.Struct, frozen=True, kw_only=True):
    """The value of a state before the first step, where it is not zero. It is the same for all streams.

    Attributes:
        shape: the state's shape without its batch axis; 1 for an axis along which it is constant, as in (C, 1, 1).
        dtype: dtype of `data`.
        data: the values in C order, little-endian; base64 in JSON.
    """

    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "float64"]
    data: bytes

    @classmethod
    def of(cls, value: ArrayLike) -> InitialValue:
        """From an array of floats, without the batch axis."""
        array = np.ascontiguousarray(value)
        name: Any = array.dtype.newbyteorder("=").name
        return cls(shape=np.shape(value), dtype=name, data=array.astype(array.dtype.newbyteorder("<")).tobytes())

    def array(self) -> NDArray[Any]:
        """The value as an array; `StepContract.check` verifies that the data fits the shape."""
        little: NDArray[Any] = np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<"))
        return little.astype(self.dtype).reshape(self.shape)

    def __str__(self) -> str:
        return f"a value of shape {' x '.join(map(str, self.shape)) or '1'}"


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A recurrent state, which is passed from one step to the next.

    Attributes:
        name: `h`, `c`, `h0`, `c0`, `encoder.2.h`, ...
        shape: as in `TensorSpec`; every symbol also occurs in a data input.
        dtype: in which the state is stored between steps (float32 by default).
        batch_axis: number of the axis that counts streams; None: it has none, and the model steps one stream.
        init: value before the first step: "zeros", or a learned one.
        original_input: name of the input tensor in the file that was fused.
        original_output: name of the output tensor in that file.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: DType = "float32"
    batch_axis: int | None = 0
    init: Literal["zeros"] | InitialValue = "zeros"
    input: str = ""
    output: str = ""
    original_input: str | msgspec.UnsetType = msgspec.UNSET
    original_output: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        # Stored in the JSON for readers that do not know the rule; derived here so that they always follow it.
        msgspec.structs.force_setattr(self, "input", STATE_IN + self.name)
        msgspec.structs.force_setattr(self, "output", STATE_OUT + self.name)

    def initial(self, shape: Sequence[int]) -> NDArray[Any]:
        """The value before the first step in the dtype of the state: a read-only array of `shape`, batch included."""
        value = np.zeros((), self.dtype)
        if isinstance(self.init, InitialValue):
            value = self.init.array().astype(self.dtype)
            value = value if self.batch_axis is None else np.expand_dims(value, self.batch_axis)
        return np.broadcast_to(value, tuple(shape))

    @property
    def streams(self) -> Dim:
        """The number of streams that it holds: the size of its batch axis, 1 without one."""
        return 1 if self.batch_axis is None else self.shape[self.batch_axis]

    def by_stream(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of the state with the axis of the streams first; it is added where there is none."""
        return array[None] if self.batch_axis is None else np.moveaxis(array, self.batch_axis, 0)


Spec = TensorSpec | StateSpec


class CellSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A recurrent cell of the graph.

    Attributes:
        op: a stepcell op; None: the cell consists of standard ONNX nodes, and `reason` says why.
    """

    name: str
    op: str | None
    hidden: int
    kernel: tuple[int, int]
    reset: Reset | None = None
    gates: Gates = "soft"
    peephole: bool = False
    reason: str | None = None


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the check after export: errors over some steps with states fed back, and their derived bound.

    Attributes:
        steps: number of steps.
        reference: what the model was compared with.
        arithmetic: how the file was computed; None: not recorded.
        max_abs_error: largest absolute error over all steps, by name of the output or state.
        rms_error: largest root mean square error of a step, by name of the output or state of floats.
        differing: by name of an output or state of integers or booleans, the largest share of its elements that
            differ at a step.
        rho: factor per step by which a perturbation of the states shrinks or grows; None: not derived.
        memory: frames after which a perturbation is at 1/e; None where rho is not below 1.
        bound: largest rms error in a run of any length, by name, see docs/verify.md; None where rho is not below 1: no
            bound exists, since a rounding error is never forgotten.
    """

    steps: int
    reference: str
    max_abs_error: dict[str, float]
    rms_error: dict[str, float] = {}
    differing: dict[str, float] = {}
    arithmetic: str | None = None
    rho: float | None = None
    memory: float | None = None
    bound: dict[str, float] | None = None


class StepContract(msgspec.Struct, frozen=True, kw_only=True):
    """The contract.

    Attributes:
        schema: version `major.minor`; an unknown major version is refused.
        family: name of the model family; "module" for a torch module, "adopted" for an ONNX file of another program.
        precision: compute dtype of the graph ("float16" or "float32").
        inputs: data inputs in the order of the ONNX graph.
        outputs: data outputs in that order.
        states: states in that order.
        cells: the recurrent cells of the graph.
        example: value of every symbol in the export.
        source: origin of the weights: hash of the checkpoint, arguments, versions of tools, opset.
        parity: result of the parity check; None: not checked yet.
        graph_sha256: of the graph and its weights (`stepcell.graph_hash`); unset: not recorded.
        quantization: how `stepcell quantize` made it; unset: it has no int8 layers of that origin.
    """

    schema: str = SCHEMA
    family: str = "module"
    precision: Literal["float16", "float32"] = "float32"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    cells: tuple[CellSpec, ...] = ()
    example: dict[str, int] = {}
    source: dict[str, Any] = {}
    parity: Parity | None = None
    graph_sha256: str | msgspec.UnsetType = msgspec.UNSET
    quantization: Quantization | msgspec.UnsetType = msgspec.UNSET

    @property
    def symbols(self) -> list[str]:
        """Symbols of the data inputs, in order of appearance."""
        return symbols_of(dim for spec in self.inputs for dim in spec.shape)

    @property
    def graph_inputs(self) -> dict[str, Spec]:
        """Inputs of the ONNX graph by name: data inputs, then states."""
        return {**{spec.name: spec for spec in self.inputs}, **{state.input: state for state in self.states}}

    @property
    def graph_outputs(self) -> dict[str, Spec]:
        """Outputs of the ONNX graph by name: data outputs, then states."""
        return {**{spec.name: spec for spec in self.outputs}, **{state.output: state for state in self.states}}

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Value of every symbol, from the shape of every data input.

        Raises:
            InputError: an input is missing or unknown, or its shape does not fit.
        """
        names = [spec.name for spec in self.inputs]
        if set(shapes) != set(names):
            raise InputError(f"inputs: expected {', '.join(names) or 'none'}, got {', '.join(shapes) or 'none'}")
        symbols = bind((spec.name, spec.shape, shapes[spec.name]) for spec in self.inputs)
        for spec in self.inputs:
            _check_multiple(spec, shapes[spec.name])
        return symbols

    def state_shapes(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Concrete shape of every state.

        Raises:
            InputError: a state would be empty, because the inputs are too small.
        """
        shapes = {state.name: resolve(state.shape, symbols) for state in self.states}
        for name, shape in shapes.items():
            if any(not 1 <= size <= LARGEST for size in shape):
                raise InputError(
                    f"{name}: this state would have shape {shape} for {dict(symbols)}", hint="use larger frames"
                )
        return shapes

    def to_json(self) -> str:
        """Indented JSON with the fields in the order of this class."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def to_sealed_json(self) -> str:
        """The same with a last field `checksum`, as a file holds it (`stepcell.seal`)."""
        document = msgspec.json.encode({**msgspec.to_builtins(self), "checksum": ZEROS})
        return sealed(msgspec.json.format(document, indent=1), _CHECKSUM).decode()

    @classmethod
    def from_json(cls, text: str | bytes, *, subject: str = "contract", check: bool = True) -> StepContract:
        """Read and check a contract.

        Args:
            subject: the file, for messages.
            check: False: accept a document that was edited and still has its old checksum.

        Raises:
            ContractError: not JSON, a field of the wrong type, an unknown major version, a checksum that does not fit,
                a duplicate name, or a state whose size does not follow from the inputs.
        """
        malformed = "malformed contract"
        head = decode_json(text, _Head, subject, ContractError, what=malformed)
        if head.schema.split(".")[0] != SCHEMA.split(".")[0]:
            raise ContractError(
                f"{subject}: schema {head.schema} is not supported; this stepcell reads {SCHEMA.split('.')[0]}.x",
                hint="update stepcell, or export the model again with this version",
            )
        if check:
            _check_sealed(text, head, subject)
        contract = decode_json(text, cls, subject, ContractError, what=malformed)
        contract.check(subject)
        return contract

    def check(self, subject: str = "contract") -> None:
        """Raise ContractError unless every field is usable and all fit each other."""
        check_contract(self, subject)


class _Head(msgspec.Struct):
    schema: str
    checksum: str | None = None


def _check_sealed(text: str | bytes, head: _Head, subject: str) -> None:
    """Check that a sealed contract is as it was written; one without a checksum may be by hand or another program."""
    data = text.encode() if isinstance(text, str) else text
    if head.checksum is not None and check_seal(data, _CHECKSUM, head.checksum) is not None:
        raise ContractError(
            f"{subject}: was changed after it was written: its checksum does not fit",
            hint="get the file again from where it was exported; if it was edited on purpose: --no-check",
        )
    # A damaged name of the field `checksum` would take the check away with it.
    fields = decode_json(text, dict[str, Any], subject, ContractError, what="malformed contract").keys()
    unknown = fields - set(StepContract.__struct_fields__) - {"checksum"}
    if unknown and _minor(head.schema) <= _minor(SCHEMA):
        raise ContractError(f"{subject}: schema {head.schema} has no field {min(unknown)!r}")


def _minor(version: str) -> int:
    text = version.partition(".")[2]
    return int(text) if text.isascii() and text.isdecimal() else 0


def _check_multiple(spec: TensorSpec, shape: Sequence[int]) -> None:
    if nv12_of(spec) and (fault := nv12_fault(*shape[-2:])):
        raise InputError(f"{spec.name}: {fault}")
    if spec.layout is None or spec.pad_multiple == 1:
        return
    for axis, size in zip(spec.layout, shape, strict=True):
        if axis in "HW" and size % spec.pad_multiple:
            raise InputError(
                f"{spec.name}: height and width must be multiples of {spec.pad_multiple}, got {tuple(shape)}",
                hint="use the next larger multiple; `stepcell run` pads frames to it and crops the results",
            )


def state_names(cells: Sequence[Sequence[str]], *, numbered: bool = False) -> list[str]:
    """Names for a stack of cells: `h`; `h0`, `c0`, `h1`, ...; zero-padded above ten cells.

    Args:
        cells: names of the states of each cell, for example `("h",)` or `("h", "c")`.
        numbered: also number the states of a single cell.
    """
    if len(cells) == 1 and not numbered:
        return list(cells[0])
    width = len(str(len(cells) - 1))
    return [f"{name}{index:0{width}d}" for index, names in enumerate(cells) for name in names]
