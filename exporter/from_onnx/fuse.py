"""Conversion of an ONNX file of another program to a step model: pairs states, replaces cells, compares, writes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx
import onnxscript
from onnxscript import ir

from stepcell import __version__
from stepcell.contract import CellSpec, StateSpec, StepContract
from stepcell.errors import ContractError, ExportError, UsageError
from stepcell.exporter.cell_recognition.cell import NearMiss, RecognisedCell
from stepcell.exporter.cell_recognition.find import find_cells
from stepcell.exporter.cell_recognition.normalise import normalise
from stepcell.exporter.cell_recognition.replace import replace_cells
from stepcell.exporter.declared_range import warn_of_range
from stepcell.exporter.from_onnx.check import check_fused
from stepcell.exporter.from_onnx.contract import contract_of, rename
from stepcell.exporter.from_onnx.evidence import Evidence, find_evidence
from stepcell.exporter.from_onnx.input_values import Number, bake, checked_values
from stepcell.exporter.from_onnx.onnx_file import OnnxFile, read_onnx_file
from stepcell.exporter.from_onnx.pairs import Pairing, find_pairs
from stepcell.exporter.from_onnx.projections import refuse_projections
from stepcell.exporter.from_onnx.redeclare import declared, redeclare
from stepcell.exporter.from_onnx.restore import cells_of_nodes, check_restored, restore_contract
from stepcell.exporter.from_onnx.sizes import find_sizes
from stepcell.exporter.from_onnx.state_ends import with_equal_ends
from stepcell.exporter.from_onnx.stream_axis import StreamAxes, find_stream_axes
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.parity import Seen
from stepcell.exporter.step_onnx.graph import attach_functions, embed_contract
from stepcell.exporter.step_onnx.pixels_in_graph.check import with_pixels_in_graph
from stepcell.exporter.undeclared_integers import integers_explained
from stepcell.external_weights import ONE_FILE, load_external_weights
from stepcell.files import atomic_path
from stepcell.library_errors import library_errors
from stepcell.onnx_model import read_onnx
from stepcell.ops import DOMAIN
from stepcell.overwrite import check_output, is_exported_model
from stepcell.pixels import Declaration, PixelDType

__all__ = ["FuseReport", "fuse"]

OPSET = 18  # the first with the Split of the op functions


class FuseReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `fuse`.

    Attributes:
        contract: as written; `cells` has the replaced cells and those not replaced, with the reason,
            and `parity` the comparison with the original file.
        transforms: by cell, the exact transformation of its weights, where one was needed.
        notes: for a person: what may be a state and was not taken, cells that could not be replaced.
        warnings: for a person: what the file does not remember from step to step.
        nodes_before: nodes of the graph before, without those of graphs inside nodes.
        nodes_after: the same after.
        redeclared: the file had a contract, and only what it says of pictures and values was changed, or pixels are
            converted in its graph.
    """

    contract: StepContract
    transforms: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    redeclared: bool = False

    @property
    def fused(self) -> tuple[CellSpec, ...]:
        """The cells that were replaced by an op."""
        return tuple(cell for cell in self.contract.cells if cell.op is not None)


def fuse(
    source: str | Path,
    target: str | Path,
    *,
    states: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    stateless: bool = False,
    constants: Mapping[str, Sequence[Number]] | None = None,
    values: Mapping[str, Sequence[Number]] | None = None,
    contract: str | Path | None = None,
    tolerance: float | None = None,
    pixels: Declaration | None = None,
    pixel_dtype: PixelDType = "float",
    overwrite: bool = False,
) -> FuseReport:
    """Find the states of an ONNX file, replace its recurrent cells by the ops, and write it with a contract.

    In a file that has a contract, `pixels` and `values` change what it says of pictures and inputs, `pixel_dtype` puts
    the conversion of pixels into its graph, and nothing else is changed.

    Args:
        source: an ONNX file of one step with its states as inputs and outputs.
        target: the file to write, neither `source` nor a file with its weights.
        states: by state input the output that is its next value, where names and graph do not
            determine it; an empty output: the input is not a state.
        shapes: sizes to fix, by input.
        stateless: no input is a state, whatever names and graph say.
        constants: by input the values that replace it, in C order; one number fills it.
        values: by input the values that it has in a step that is not given any; it stays an input.
        contract: the file that `source` was before another tool changed it: its contract is brought back (`restore`),
            and neither states nor shapes are given.
        tolerance: with `contract`, the difference to that file that is allowed, relative to max(1, largest value).
        pixels: what the values of pictures are, as in `export_onnx`; undefined otherwise.
        pixel_dtype: as in `export_onnx`.
        overwrite: replace an existing file that is no model with a contract.

    Returns:
        The contract as written, and a report.

    Raises:
        UsageError: the states are ambiguous, an argument does not fit, the file has a contract and more than `pixels`,
            `values` and `pixel_dtype` is given or nothing, no input is a picture that can be bytes, or `target` is an
            input or a foreign file.
        InputError: the file cannot be read or is not an ONNX model.
        ExportError: it cannot be converted; the message says why.
        ParityError: the result differs from the original over 100 steps; nothing is written.
        OutputError: `target` cannot be written.
    """
    source, target, contract = Path(source), Path(target), None if contract is None else Path(contract)
    said = states or shapes or stateless or constants
    if contract is not None and (said or values):
        raise UsageError(
            "--contract: brings states, sizes and values of the original; leave out --state, --stateless, --shape, "
            "--constant and --value"
        )
    if tolerance is not None and contract is None:
        raise UsageError("--tolerance: is for --contract")
    reads: dict[str | Path, str] = {source: "the model"}
    reads |= {} if contract is None else {contract: "--contract"}
    check_output(target, is_exported_model, reads=reads, overwrite=overwrite)
    with atomic_path(target) as temporary:  # first, so that an invalid path is reported before the work
        # onnx and onnxscript raise any exception for graphs that they do not expect
        with library_errors(str(source), ExportError, what="cannot be converted"):
            if contract is not None:
                report, model = _restore(read_onnx_file(source, with_contract=True), contract, tolerance, pixels)
            elif (pixels or values or pixel_dtype != "float") and not said and is_exported_model(source):
                report, model = _redeclared(*redeclare(source, target, pixels, values or {}))
            else:
                file = bake(read_onnx_file(source), constants or {})
                pairs = _given_states(file, states or {}, stateless=stateless)
                report, model = _fuse(file, _Given(pairs, shapes or {}, values or {}, stateless, pixels))
            if pixel_dtype != "float":
                load_external_weights(model, source, limit=ONE_FILE)
                model, found = with_pixels_in_graph(model, report.contract, pixel_dtype)
                report = msgspec.structs.replace(report, contract=found, nodes_after=len(model.graph.node))
        temporary.write_bytes(model.SerializeToString())
    return report


def _redeclared(contract: StepContract, model: onnx.ModelProto) -> tuple[FuseReport, onnx.ModelProto]:
    count = len(model.graph.node)
    report = FuseReport(
        contract=contract, transforms={}, notes=(), warnings=(), nodes_before=count, nodes_after=count, redeclared=True
    )
    return report, model


def _given_states(file: OnnxFile, states: Mapping[str, str], *, stateless: bool) -> Mapping[str, str]:
    if not stateless:
        return states
    if pairs := [f"--state {source}={target}" for source, target in states.items() if target]:
        raise UsageError(f"--stateless: no input is a state, but {pairs[0]} makes one", hint="leave out one of the two")
    return {**states, **{port.name: "" for port in file.inputs}}


def _fuse(file: OnnxFile, given: _Given) -> tuple[FuseReport, onnx.ModelProto]:
    found = _find(file)
    pairing = find_pairs(file.inputs, file.outputs, found.evidence, given.states)
    file, reshaped = with_equal_ends(file, pairing.pairs)
    found = _find(file) if reshaped else found
    refuse_projections(file)
    original = OnnxSession(file.data, str(file.path))
    model, cells = found.model, found.cells
    values = _values_of_data(file, pairing, given.values)
    sizes = find_sizes(file, original, pairing.pairs, given.shapes, values)
    streams = find_stream_axes(file, original, pairing.pairs, sizes)
    source = {
        "onnx_sha256": file.sha256,
        "producer": f"{file.model.producer_name} {file.model.producer_version}".strip(),
        "original_opset": file.opset,
        "stepcell": __version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "opset": model.opset_imports.get("", file.opset),
    }
    contract = contract_of(file, pairing.pairs, sizes, streams, values, cells, found.near_misses, source)
    contract = declared(contract, given.pixels)
    try:
        contract.check(str(file.path))
    except ContractError as error:
        raise ExportError(error.message, hint=error.hint) from error
    if cells:
        replace_cells(model, cells)
    proto = rename(model, file, contract)
    if cells:
        proto.ir_version = max(proto.ir_version, 8)  # the first with functions
        contract = attach_functions(proto, contract)
    embed_contract(proto, contract)
    fused = OnnxSession(proto.SerializeToString(), f"{file.path}, fused")
    seen: Seen = {}
    with integers_explained(contract):
        parity = check_fused(original, fused, contract, sizes, seen)
    if given.pixels:
        warn_of_range(contract, seen)
    contract = embed_contract(proto, msgspec.structs.replace(contract, parity=parity))
    report = FuseReport(
        contract=contract,
        transforms={cell.name: cell.note for cell in cells if cell.note},
        notes=(
            *file.notes,
            *found.notes,
            *pairing.notes,
            *reshaped,
            *(_stream_notes(contract, streams) if pairing.pairs else ()),
        ),
        warnings=() if given.stateless else tuple(found.evidence.warnings({pair.input for pair in pairing.pairs})),
        nodes_before=len(file.model.graph.node),
        nodes_after=len(proto.graph.node),
    )
    return report, proto


def _restore(
    file: OnnxFile, path: Path, tolerance: float | None, pixels: Declaration | None
) -> tuple[FuseReport, onnx.ModelProto]:
    """A changed file with the contract of the original at `path`."""
    before = read_onnx(path).contract
    original = OnnxSession(read_onnx_file(path, with_contract=True).data, str(path))
    restored = restore_contract(file, before)
    contract, notes = restored.contract, [*file.notes, *restored.notes]
    kept = cells_of_nodes(file.model, before)
    cells: list[RecognisedCell] = []
    if kept is not None:
        model = ir.from_proto(_without_op_functions(file))
        specs: Sequence[CellSpec] = kept
    else:
        found = _find(file)
        model, cells, known = found.model, found.cells, [cell for cell in before.cells if cell.op]
        if len(known) == len(cells):
            cells = [dataclasses.replace(cell, name=spec.name) for cell, spec in zip(cells, known, strict=True)]
        specs = (*(cell.spec for cell in cells), *(miss.spec for miss in found.near_misses))
        notes += found.notes
        if len(cells) < len(known):
            notes.append(f"{len(known)} cells were ops in the original, {len(cells)} are found again")
        replace_cells(model, cells)
    versions = {"stepcell": __version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    hashes = {"changed_file_sha256": file.sha256, "contract_of_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    source = {**before.source, **versions, **hashes, "opset": model.opset_imports.get("", file.opset)}
    contract = declared(msgspec.structs.replace(contract, cells=tuple(specs), source=source), pixels)
    proto = rename(model, file, contract, restored.names)
    contract = msgspec.structs.replace(contract, states=_with_first_names(contract, before))
    try:
        contract.check(str(file.path))
    except ContractError as error:
        raise ExportError(error.message, hint=error.hint) from error
    if cells or kept:
        proto.ir_version = max(proto.ir_version, 8)
        contract = attach_functions(proto, contract)
    session = OnnxSession(proto.SerializeToString(), f"{file.path}, with its contract")
    parity = check_restored(original, before, session, contract, tolerance)
    contract = embed_contract(proto, msgspec.structs.replace(contract, parity=parity))
    report = FuseReport(
        contract=contract,
        transforms={},
        notes=tuple(notes),
        warnings=(),
        nodes_before=len(file.model.graph.node),
        nodes_after=len(proto.graph.node),
    )
    return report, proto


def _without_op_functions(file: OnnxFile) -> onnx.ModelProto:
    """The model without definitions of the ops, in an opset that has those that are added again."""
    others = [function for function in file.model.functions if function.domain != DOMAIN]
    del file.model.functions[:]
    file.model.functions.extend(others)
    if file.opset >= OPSET:
        return file.model
    try:
        return onnx.version_converter.convert_version(file.model, OPSET)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{file.path}: the ops need opset {OPSET}, the file has {file.opset}: {_text(error)}"
        ) from error


def _with_first_names(contract: StepContract, before: StepContract) -> tuple[StateSpec, ...]:
    """The states with the names that the original records for a file that was fused, or none."""
    return tuple(
        msgspec.structs.replace(state, original_input=first.original_input, original_output=first.original_output)
        for state, first in zip(contract.states, before.states, strict=True)
    )


def _values_of_data(
    file: OnnxFile, pairing: Pairing, values: Mapping[str, Sequence[Number]]
) -> dict[str, tuple[Number, ...]]:
    found = checked_values(file.inputs, values, option="--value")
    for pair in pairing.pairs:
        if pair.input in found:
            raise UsageError(
                f"--value {pair.input}: is a state, which starts at zero and then follows {pair.output}",
                hint=f"if it is none: --state {pair.input}=",
            )
    return found


def _stream_notes(contract: StepContract, streams: StreamAxes) -> Iterator[str]:
    for symbol in streams.only_one:
        yield f"the file calls {symbol} dynamic, but runs only with 1: it is fixed, and the model steps one stream"
    if streams.size is None:
        names = ", ".join(f"{state.name} {' x '.join(map(str, state.shape)) or '1'}" for state in contract.states)
        yield f"no axis counts streams ({names}): the model steps one stream, and takes neither slots nor masks"


@dataclass(frozen=True)
class _Given:
    """What the user says about a file; see `fuse`."""

    states: Mapping[str, str]
    shapes: Mapping[str, Sequence[int]]
    values: Mapping[str, Sequence[Number]]
    stateless: bool
    pixels: Declaration | None


@dataclass(frozen=True)
class _Found:
    """The graph that is used from here on, its cells, and the state pairs that they imply."""

    model: ir.Model
    cells: list[RecognisedCell]
    near_misses: list[NearMiss]
    evidence: Evidence
    notes: list[str]


def _find(file: OnnxFile) -> _Found:
    """Search the graph for cells, converted to the opset of the ops; a graph without cells is not changed."""
    notes: list[str] = []
    model = file.model
    if file.opset < OPSET:
        try:
            model = onnx.version_converter.convert_version(file.model, OPSET)
            OnnxSession(model.SerializeToString(), f"{file.path}, in opset {OPSET}")
        except Exception as error:  # its errors have no common base
            model = file.model
            notes.append(
                f"the ops need opset {OPSET}, the file has {file.opset}, and onnx cannot convert it: {_text(error)}"
            )
    graph = ir.from_proto(model)
    try:
        normalise(graph)
        cells, near_misses = find_cells(graph)
    except Exception as error:  # the optimizer may fail on graphs of any exporter
        notes.append(f"the graph could not be searched for cells: {_text(error)}")
        plain = ir.from_proto(file.model)
        return _Found(plain, [], [], find_evidence(plain, [], []), notes)
    evidence = find_evidence(graph, cells, near_misses)
    if cells and not notes:
        return _Found(graph, cells, near_misses, evidence, [])
    notes = [f"{len(cells)} cell(s) stay as they are: {note}" for note in notes] if cells else []
    return _Found(ir.from_proto(file.model), [], near_misses, evidence, notes)


def _text(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
