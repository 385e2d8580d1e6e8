"""Writes a model repository for Triton's own ONNX Runtime or TensorRT back end, with the states in the server's memory.

OUT/models/NAME/config.pbtxt          inputs, outputs, states
OUT/models/NAME/1/model.onnx          a copy of the model, or an engine and its sidecar
OUT/models/NAME/initial_state/stateN  values of a state that does not begin with zeros

Triton calls this implicit state: an output of a request is an input of the next one of its sequence. No code of
stepcell runs there, so nothing of what `stepcell.runtime.serving.protocol` promises holds.

What the sources of Triton say, and its documentation does not (core, onnxruntime_backend, tensorrt_backend of 2026):

- States are held in two maps, inputs and outputs, each sorted by name; the n-th output is the next n-th input, whatever
  the configuration pairs. The names of a contract sort alike, because they differ in their prefix only.
- An open size of a state is 1 in the first request, also where an initial state has another; so all sizes are given.
- The ONNX Runtime back end does not compare type and shape of a state's output at the load. That is done here.
- Sizes of outputs must be open where the ONNX file leaves them open; those of inputs need not be.
- A model whose tensors all have an open first size gets a batch of 4 when it is configured with none.
- Memory that a state's input and output share is overwritten while a step still reads it; it is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from stepcell.contract import Spec, StateSpec, StepContract
from stepcell.dims import Dim, resolve, symbols_of
from stepcell.errors import ContractError, UsageError
from stepcell.onnx_model import read_model
from stepcell.overwrite import MARK
from stepcell.runtime.engine.sidecar import Sidecar
from stepcell.runtime.loop.slots import SlotTable
from stepcell.runtime.serving.pbtxt import check_name, check_schema, data_type, listed, quoted
from stepcell.runtime.serving.repository_files import write_files
from stepcell.shapes import format_shapes

__all__ = ["ImplicitStateRepository"]


@dataclass(frozen=True)
class ImplicitStateRepository:
    """What is written.

    Attributes:
        source: the model's file.
        contract: of the model.
        sidecar: of an engine; None: the model is an ONNX file.
        folder: OUT.
        name: of the model on the server.
        shapes: of the data inputs, where the model leaves sizes open; the size of the batch is not looked at.
        slots: streams that are in use at a time, and rows of a batch at most.
        device: "cpu", "cuda" or "cuda:N".
        instances: of one server.
        idle: seconds after which the server forgets a stream.
        batch_wait: seconds for which a frame waits for those of other streams.
    """

    source: Path
    contract: StepContract
    sidecar: Sidecar | None
    folder: Path
    name: str
    shapes: Mapping[str, Sequence[int]]
    slots: int
    device: str
    instances: int = 1
    idle: float = 30.0
    batch_wait: float = 0.02

    def write(self, *, overwrite: bool = False) -> tuple[list[Path], bool]:
        """Write all files; returns their paths, and whether config.pbtxt was compared with the server's schema.

        Raises:
            UsageError: a model that these back ends cannot serve, sizes that are not given, a name that Triton does not
                take, or a file there that is not of this command.
            InputError: sizes that the model does not take.
            ContractError: the states of the graph are not those of the contract.
            OutputError: the folder cannot be written.
        """
        check_name(self.name)
        self._require_servable()
        if self.sidecar is None:
            _check_pairs(self.source, self.contract)
        batched = self._is_batched()
        sizes = self._sizes()
        if self.sidecar is not None:
            self._check_profiles(self.sidecar, sizes, batched)
        config = self.folder / "models" / self.name / "config.pbtxt"
        version = config.parent / "1"
        if (version / "model.py").exists():
            raise UsageError(
                f"--output {self.folder}: holds this model as stepcell serves it, and the server would take both",
                hint="choose another folder",
            )
        text = self._config(sizes, batched)
        checked = check_schema(text)
        data = {
            config.parent / "initial_state" / f"state{number}": _initial(state, sizes)
            for number, state in enumerate(self.contract.states)
            if state.init != "zeros"
        }
        model = version / self.source.name
        written = write_files(
            self.folder, {config: text}, source=self.source, model=model, data=data, overwrite=overwrite
        )
        return written, checked

    def tensors(self) -> str:
        """What clients send and get, for people: `x float32 3x256x256 -> y float32 ?x?x?`."""
        batched, sizes = self._is_batched(), self._sizes()
        sent = [_Tensor(spec, resolve(spec.shape, sizes), batched) for spec in self.contract.inputs]
        answered = [_Tensor(spec, spec.shape, batched) for spec in self.contract.outputs]
        return f"{', '.join(map(str, sent))} -> {', '.join(map(str, answered))}"

    def _require_servable(self) -> None:
        for spec in self.contract.inputs:
            if spec.value is not msgspec.UNSET:
                raise UsageError(
                    f"{spec.name}: has a value in the contract, which stepcell gives at each step and Triton's back "
                    "ends do not",
                    hint="without --implicit-state it is served",
                )
        if not self.contract.states:
            raise UsageError(f"{self.source}: has no state, so its frames are no sequence")
        sidecar = self.sidecar
        if sidecar is None:
            return
        if self.device == "cpu":
            raise UsageError("--device cpu: an engine runs on a GPU")
        if sidecar.fingerprint.flavor != "tensorrt":
            raise UsageError(
                f"{self.source}: was built by TensorRT-RTX, and Triton's back end loads engines of TensorRT",
                hint="stepcell build MODEL.onnx --flavor tensorrt",
            )
        plugin = sidecar.plugin
        if sidecar.fp16_mirrors or (plugin is not None and plugin.used and not plugin.portable):
            raise UsageError(
                f"{self.source}: needs stepcell's plugin, which is Python, and Triton's back end has none",
                hint="stepcell build MODEL.onnx --plugin off",
            )

    def _is_batched(self) -> bool:
        """Whether streams share batches along the first axis; otherwise the server steps one at a time."""
        contract, reason = self.contract, ""
        tensors = [*contract.graph_inputs.values(), *contract.graph_outputs.values()]
        try:
            table = SlotTable(contract, self.slots)
            axes = {*table.input_axes.values(), *table.output_axes.values(), *(s.batch_axis for s in contract.states)}
            if axes != {0}:
                reason = "its streams are not counted by the first axis of every tensor"
            elif any(isinstance(spec.shape[0], int) for spec in tensors):
                reason = f"its batch is fixed at {contract.states[0].streams}"
            elif any(len(spec.shape) < 2 for spec in tensors):
                reason = "a tensor has no axis besides that of the streams"
            else:
                return True
        except UsageError as error:
            reason = error.message
        streams = {state.streams for state in contract.states}
        if any(isinstance(count, int) and count != 1 for count in streams):
            raise UsageError(f"{self.source}: {reason}: Triton steps each stream by itself", hint="export it with 1")
        if self.slots != 1:
            raise UsageError(
                f"{self.source}: streams cannot share a batch in Triton's back ends: {reason}",
                hint="--slots 1 steps one stream at a time; or export it with --dynamic batch",
            )
        if not any(isinstance(spec.shape[0], int) for spec in tensors if spec.shape):
            raise UsageError(
                f"{self.source}: the first size of every tensor is open, and Triton would take it for the batch",
                hint="export it with fixed sizes",
            )
        return False

    def _sizes(self) -> dict[str, int]:
        """A value of every symbol, 1 for those that count streams."""
        contract = self.contract
        batch = {dim: 1 for state in contract.states if isinstance(dim := state.streams, str)}
        names = {spec.name for spec in contract.inputs}
        absent = [name for name in self.shapes if name not in names]
        if absent:
            raise UsageError(f"--shape {absent[0]}: the model has no such input; it has {', '.join(names)}")
        shapes = dict(self.shapes)
        if self.sidecar is not None:  # an engine for one size of frames has no others
            for name, profile in self.sidecar.profiles.items():
                if profile.min[1:] == profile.max[1:] and name in names:
                    shapes.setdefault(name, profile.opt)
        open_sizes = set(contract.symbols) - set(batch)
        unknown = [
            spec for spec in contract.inputs if spec.name not in shapes and open_sizes & set(symbols_of(spec.shape))
        ]
        if unknown:
            example = {**dict.fromkeys(open_sizes, 256), **contract.example, **batch}
            written = format_shapes({spec.name: resolve(spec.shape, example) for spec in unknown})
            raise UsageError(
                f"{unknown[0].name}: its sizes {unknown[0].shape} are open, and the server needs those of every state",
                hint=f"such as --shape {written}",
            )
        given = {spec.name: shapes.get(spec.name) or resolve(spec.shape, batch) for spec in contract.inputs}
        sizes = contract.bind(given) | batch
        contract.state_shapes(sizes)
        return sizes

    def _check_profiles(self, sidecar: Sidecar, sizes: Mapping[str, int], batched: bool) -> None:
        """Raise UsageError for sizes that an engine was not built for."""
        batch = {dim for state in self.contract.states if isinstance(dim := state.streams, str)}
        for rows in {1, self.slots if batched else 1}:
            for name, spec in self.contract.graph_inputs.items():
                profile = sidecar.profiles.get(name)
                shape = resolve(spec.shape, {**sizes, **dict.fromkeys(batch, rows)})
                if profile is not None and shape not in profile:
                    raise UsageError(
                        f"{self.source}: {name} {format_shapes({name: shape})} is outside of what it was built for: "
                        f"{profile.min} to {profile.max}",
                        hint=f"--slots, --shape, or an engine for 1 to {self.slots} rows",
                    )

    def _config(self, sizes: Mapping[str, int], batched: bool) -> str:
        inputs = [_Tensor(spec, resolve(spec.shape, sizes), batched) for spec in self.contract.inputs]
        outputs = [_Tensor(spec, spec.shape, batched) for spec in self.contract.outputs]
        states = [_state(number, state, sizes, batched) for number, state in enumerate(self.contract.states)]
        device = "KIND_CPU" if self.device == "cpu" else "KIND_GPU"
        gpus = f" gpus: [ {self.device[5:]} ]" if self.device.startswith("cuda:") else ""
        engine = self.sidecar
        back_end = 'backend: "onnxruntime"' if engine is None else 'platform: "tensorrt_plan"'
        needs = ""
        if engine is not None:
            version = engine.fingerprint.tensorrt
            needs = f"# The server needs TensorRT {version}. Not run by stepcell: no such server was at hand.\n"
        batching = (
            f"\n    preferred_batch_size: [ {self.slots} ]"
            f"\n    max_queue_delay_microseconds: {round(self.batch_wait * 1e6)}"
        )
        return f"""# {MARK}: stepcell triton-repo --implicit-state
# The states are in the server's memory only, and nobody looks whether a frame was lost, repeated or overtaken:
# docs/fleet.md says what that means.
{needs}name: {quoted(self.name)}
{back_end}
default_model_filename: {quoted(self.source.name)}
max_batch_size: {self.slots if batched else 0}
input [
{listed([each.config() for each in inputs])}
]
output [
{listed([each.config() for each in outputs])}
]
instance_group [ {{ count: {self.instances} kind: {device}{gpus} }} ]
sequence_batching {{
  max_sequence_idle_microseconds: {round(self.idle * 1e6)}
  oldest {{
    max_candidate_sequences: {self.slots}{batching if batched else ""}
  }}
  state [
{listed(states)}
  ]
}}
"""


@dataclass(frozen=True)
class _Tensor:
    spec: Spec
    shape: Sequence[Dim]
    batched: bool

    @property
    def dims(self) -> list[Dim]:
        """As the configuration has them: without the batch, and open where they are no numbers."""
        return [dim if isinstance(dim, int) else -1 for dim in self.shape[int(self.batched) :]]

    def config(self) -> str:
        dims = ", ".join(map(str, self.dims))
        return f"{{ name: {quoted(self.spec.name)} data_type: {data_type(self.spec.dtype)} dims: [ {dims} ] }}"

    def __str__(self) -> str:
        sizes = "x".join("?" if dim == -1 else str(dim) for dim in ([1] if self.batched else []) + self.dims)
        return f"{self.spec.name} {self.spec.dtype} {sizes}"


def _state(number: int, state: StateSpec, sizes: Mapping[str, int], batched: bool) -> str:
    dims = ", ".join(map(str, _Tensor(state, resolve(state.shape, sizes), batched).dims))
    kind = data_type(state.dtype)
    value = "zero_data: true" if state.init == "zeros" else f'data_file: "state{number}"'
    return f"""  {{
      input_name: {quoted(state.input)}
      output_name: {quoted(state.output)}
      data_type: {kind}
      dims: [ {dims} ]
      initial_state [ {{ name: {quoted(state.name)} data_type: {kind} dims: [ {dims} ] {value} }} ]
    }}"""


def _initial(state: StateSpec, sizes: Mapping[str, int]) -> bytes:
    array = state.initial(resolve(state.shape, sizes))
    return array.astype(np.dtype(state.dtype).newbyteorder("<")).tobytes()


def _check_pairs(path: Path, contract: StepContract) -> None:
    """Compare the states of an ONNX graph with the contract: one input and one output each, of one type and rank.

    Raises:
        InputError: the file cannot be read.
        ContractError: they differ.
    """
    graph = read_model(path)[1].graph
    found = {}
    for kind, values in (("input", graph.input), ("output", graph.output)):
        names = [value.name for value in values]
        wanted = contract.graph_inputs if kind == "input" else contract.graph_outputs
        if sorted(names) != sorted(wanted):
            raise ContractError(f"{path}: its {kind}s are {', '.join(names)}, and its contract has {', '.join(wanted)}")
        found.update({value.name: value.type.tensor_type for value in values})
    for state in contract.states:
        before, after = found[state.input], found[state.output]
        sizes = [[dim.dim_value or dim.dim_param for dim in each.shape.dim] for each in (before, after)]
        if before.elem_type != after.elem_type or sizes[0] != sizes[1]:
            raise ContractError(
                f"{path}: {state.input} and {state.output} differ in type or shape: {sizes[0]}, {sizes[1]}"
            )
