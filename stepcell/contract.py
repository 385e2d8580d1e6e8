"""The state contract: what a step model takes, returns and remembers.

The exporter writes it as one JSON document into the ONNX file (metadata key `stepcell.contract`)
and the builder into the engine's sidecar; the step loop wires states from it alone. Field by
field: docs/contract.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepcell.dims import Dim, bind, resolve, symbols_of
from stepcell.errors import ContractError, InputError
from stepcell.event_spec import EventSpec
from stepcell.ops import Gates, Reset

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

SCHEMA = "1.0"
METADATA_KEY = "stepcell.contract"
# A prefix pair: inputs and outputs sort alike, so servers that pair states by sorted name
# (Triton Inference Server) pair them right. Suffix pairs have swapped states in the field.
STATE_IN = "state_in."
STATE_OUT = "state_out."

DType = Literal["float16", "float32", "float64", "int32", "int64", "bool", "uint8"]
MAX_INITIAL_BYTES = 4 << 20  # of one state's initial value: a contract stays a document


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A data input or output.

    Attributes:
        name: the model's own name for it.
        shape: numbers, symbols or expressions of symbols (see `stepcell.dims`).
        dtype: element type.
        layout: axes in order, such as "NCHW", or None where no axis has a name.
        range: smallest and largest value the model was trained on, for images; None: unscaled.
        mean, std: per-channel normalisation applied after scaling to `range`, or None.
        pad_multiple: height and width are padded up to a multiple of this before the step.
        events: how it is made of the events of an event camera, where it is.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: DType = "float32"
    layout: str | None = None
    range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pad_multiple: int = 1
    events: EventSpec | msgspec.UnsetType = msgspec.UNSET


class InitialValue(msgspec.Struct, frozen=True, kw_only=True):
    """What a state holds before its first step, where that is not zero; the same for every stream.

    Attributes:
        shape: the state's without its batch axis; 1 where all positions of an axis are alike, as
            in (C, 1, 1).
        dtype: of the numbers in `data`.
        data: the numbers in C order, little-endian; base64 in JSON.
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
        """The numbers; `StepContract.check` has seen that they fill the shape."""
        little: NDArray[Any] = np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<"))
        return little.astype(self.dtype).reshape(self.shape)

    def __str__(self) -> str:
        return f"a value of shape {' x '.join(map(str, self.shape)) or '1'}"


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A hidden state, carried from one step to the next.

    Attributes:
        name: `h`, `c`, `h0`, `c0`, `encoder.2.h`, ...
        shape: as in `TensorSpec`; every symbol also occurs in a data input.
        dtype: how it is stored between steps (float32 unless asked otherwise).
        batch_axis: the axis that counts streams.
        init: its value before the first step: "zeros", or a learned one.
        original_input, original_output: what the file that was adopted called the two ends.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: DType = "float32"
    batch_axis: int = 0
    init: Literal["zeros"] | InitialValue = "zeros"
    input: str = ""
    output: str = ""
    original_input: str | msgspec.UnsetType = msgspec.UNSET
    original_output: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        # Written out in the JSON so that a reader needs no rule, derived so that they cannot differ.
        msgspec.structs.force_setattr(self, "input", STATE_IN + self.name)
        msgspec.structs.force_setattr(self, "output", STATE_OUT + self.name)

    def initial(self, shape: Sequence[int]) -> NDArray[Any]:
        """The state before its first step, in its dtype, as a read-only view of `shape` (sizes, batch included)."""
        value = np.zeros((), self.dtype)
        if isinstance(self.init, InitialValue):
            value = np.expand_dims(self.init.array().astype(self.dtype), self.batch_axis)
        return np.broadcast_to(value, tuple(shape))


Spec = TensorSpec | StateSpec


class CellSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One recurrent cell of the graph.

    Attributes:
        op: a stepcell op, or None: the cell is made of ordinary nodes, and `reason` says why.
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
    """What the check after export found: worst absolute difference over all steps.

    `amplified`: beyond the usual limit, as PyTorch in the same precision is; see docs/export.md.
    """

    steps: int
    reference: str
    max_abs_error: dict[str, float]
    amplified: bool = False


class StepContract(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document.

    Attributes:
        schema: version `major.minor`; an unknown major version is refused.
        family: name of the model family; "module" for a user's own module, "adopted" for another
            program's ONNX file.
        precision: compute dtype of the graph ("float16" or "float32").
        inputs, outputs, states: in the order of the ONNX graph.
        cells: recurrent cells in the graph.
        example: a value for every symbol, the sizes the model was exported with.
        source: where the weights came from: checkpoint hash, arguments, tool versions, opset.
        parity: result of the check after export; None before it ran.
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

    @property
    def symbols(self) -> list[str]:
        """Symbols of the data inputs, in order of appearance."""
        return symbols_of(dim for spec in self.inputs for dim in spec.shape)

    @property
    def graph_inputs(self) -> dict[str, Spec]:
        """What the ONNX graph takes, by name: data inputs, then states."""
        return {**{spec.name: spec for spec in self.inputs}, **{state.input: state for state in self.states}}

    @property
    def graph_outputs(self) -> dict[str, Spec]:
        """What the ONNX graph returns, by name: data outputs, then states."""
        return {**{spec.name: spec for spec in self.outputs}, **{state.output: state for state in self.states}}

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Value of every symbol, from the shape of every data input.

        Raises:
            InputError: an input is missing, unknown or of a shape that does not fit.
        """
        names = [spec.name for spec in self.inputs]
        if set(shapes) != set(names):
            raise InputError(f"inputs: expected {', '.join(names) or 'none'}, got {', '.join(shapes) or 'none'}")
        symbols: dict[str, int] = {}
        for spec in self.inputs:
            symbols = bind(spec.name, spec.shape, shapes[spec.name], symbols)
            _check_multiple(spec, shapes[spec.name])
        return symbols

    def state_shapes(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Concrete shape of every state."""
        return {state.name: resolve(state.shape, symbols) for state in self.states}

    def to_json(self) -> str:
        """The document as indented JSON, fields in the order of this class."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes, *, subject: str = "contract") -> StepContract:
        """Read and check a document.

        Raises:
            ContractError: not JSON, a field of the wrong type, an unknown major version, a
                duplicate name, or a state whose size does not follow from the inputs.
        """
        try:
            version = msgspec.json.decode(text, type=_Version).schema
            if version.split(".")[0] != SCHEMA.split(".")[0]:
                raise ContractError(
                    f"{subject}: schema {version} is not supported; this stepcell reads {SCHEMA.split('.')[0]}.x",
                    hint="update stepcell, or export the model again with this version",
                )
            contract = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise ContractError(f"{subject}: malformed contract: {error}") from error
        contract.check(subject)
        return contract

    def check(self, subject: str = "contract") -> None:
        """Raise ContractError where names repeat, a size cannot be derived or an initial value does not fit."""
        names = [*(spec.name for spec in self.inputs), *(state.name for state in self.states)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ContractError(f"{subject}: each input and state needs a name of its own, got twice: {repeated}")
        known = set(self.symbols)
        for spec in self.graph_outputs.values():
            unknown = set(symbols_of(spec.shape)) - known
            if unknown:
                raise ContractError(
                    f"{subject}: {spec.name}: shape {spec.shape} uses {sorted(unknown)}, which no input defines"
                )
        for state in self.states:
            _check_initial(state, subject)
        for spec in self.inputs:
            _check_events(spec, subject)


class _Version(msgspec.Struct):
    schema: str


def _check_multiple(spec: TensorSpec, shape: Sequence[int]) -> None:
    if spec.layout is None or spec.pad_multiple == 1:
        return
    for axis, size in zip(spec.layout, shape, strict=True):
        if axis in "HW" and size % spec.pad_multiple:
            raise InputError(
                f"{spec.name}: height and width must be multiples of {spec.pad_multiple}, got {tuple(shape)}",
                hint="take the next multiple up; `stepcell run` pads frames to it and crops the results by itself",
            )


def _check_events(spec: TensorSpec, subject: str) -> None:
    """A tensor of events has a channel for each bin, and a window that holds something."""
    events = spec.events
    if isinstance(events, msgspec.UnsetType):
        return
    if spec.layout != "NCHW" or len(spec.shape) != 4 or not spec.dtype.startswith("float"):
        raise ContractError(
            f"{subject}: {spec.name}: events need floats of layout NCHW, got {spec.dtype} {spec.layout} {spec.shape}"
        )
    if events.bins < 1 or spec.shape[1] != events.channels:
        raise ContractError(
            f"{subject}: {spec.name}: {events.bins} bins with polarity {events.polarity} make "
            f"{events.channels} channels, the shape has {spec.shape[1]}"
        )
    if not 0 < events.window.size < math.inf:
        raise ContractError(f"{subject}: {spec.name}: expected a window above zero, got {events.window}")


def _check_initial(state: StateSpec, subject: str) -> None:
    """An initial value must fit the state at every size it may have."""
    if not isinstance(state.init, InitialValue):
        return
    name, init = f"{subject}: {state.name}: initial value", state.init
    if not state.dtype.startswith("float"):
        raise ContractError(f"{name}: only states of floats have one, this one is {state.dtype}")
    if not 0 <= state.batch_axis < len(state.shape):
        raise ContractError(f"{name}: batch_axis {state.batch_axis} is no axis of {state.shape}")
    dims = state.shape[: state.batch_axis] + state.shape[state.batch_axis + 1 :]
    if len(init.shape) != len(dims) or any(size not in (1, dim) for size, dim in zip(init.shape, dims, strict=True)):
        raise ContractError(
            f"{name}: expected shape {dims} or 1 in the place of an axis, got {init.shape}",
            hint="a value per position needs a fixed height and width: export with --shape",
        )
    size = math.prod(init.shape) * np.dtype(init.dtype).itemsize
    if size > MAX_INITIAL_BYTES or len(init.data) != size:
        raise ContractError(
            f"{name}: expected {size} bytes of {init.dtype}, at most {MAX_INITIAL_BYTES}, got {len(init.data)}"
        )
    if not np.isfinite(init.array()).all():
        raise ContractError(f"{name}: holds NaN or Inf")


def state_names(cells: Sequence[Sequence[str]], *, numbered: bool = False) -> list[str]:
    """Names for a stack of cells: `h`; `h0`, `c0`, `h1`, ...; zero-padded above ten cells.

    Args:
        cells: for each cell the names of its own states, such as `("h",)` or `("h", "c")`.
        numbered: number them also where there is one cell.
    """
    if len(cells) == 1 and not numbered:
        return list(cells[0])
    width = len(str(len(cells) - 1))
    return [f"{name}{index:0{width}d}" for index, names in enumerate(cells) for name in names]
