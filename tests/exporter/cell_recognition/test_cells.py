"""Cells in recorded files of public code: each is found, or left alone for the recorded reason, and exact."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx.version_converter
import pytest
from onnxscript import ir

from stepcell.exporter.cell_recognition.cell import NearMiss, RecognisedCell
from stepcell.exporter.cell_recognition.find import find_cells
from stepcell.exporter.cell_recognition.normalise import normalise
from tests.exporter.cell_recognition.graphs import fused, run, worst_difference
from tests.exporter.from_onnx.cases import RECORDED, Case, find_cases, is_replaced

CASES = find_cases()
# What an op would have to offer, by the recorded cases, and what the report says about it.
REASONS = {
    "asymmetric_padding": "even kernel",
    "groupnorm_gates": "normalisation",
    "reflect_padding": "reflect padding",
    "relu_candidate": "Relu",
}
NOTES = {
    "additive_context": "context maps as input channels",
    "candidate dilation": "dilated kernel as a 5x5 kernel",
    "compose depthwise and pointwise": "depthwise and pointwise convolutions multiplied",
    "negated update gate": "update gate negated",
}
Result = tuple[onnx.ModelProto, list[RecognisedCell], list[NearMiss]]
GATES = ("Sigmoid", "Tanh", "Clip")
READ_ELSEWHERE = {"r*h used elsewhere", "gate value used elsewhere"}


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def model(case: Case) -> onnx.ModelProto:
    """In the opset of the ops' definitions, or a later one."""
    model = case.model
    opset = next(item.version for item in model.opset_import if item.domain == "")
    return model if opset >= 18 else onnx.version_converter.convert_version(model, 18)


@pytest.fixture(scope="module")
def result(model: onnx.ModelProto) -> Result:
    """The model with every cell replaced, the cells, and what was left alone."""
    return fused(model)


@pytest.mark.skipif(not RECORDED.is_dir(), reason=f"no recorded files in {RECORDED}; STEPCELL_ONNX names another place")
def test_every_recorded_file_is_there() -> None:
    cells = [cell for case in find_cases([RECORDED]) for cell in case.meta["cells"]]
    assert len(find_cases([RECORDED])) == 72
    assert Counter(cell["fusable"] for cell in cells) == {"yes": 89, "only with weight transform": 9, "no": 17}


def test_cells_of_a_file(case: Case, result: Result) -> None:
    """Number, kind, width, kernel and weight transformation; the others with the true reason."""
    _, cells, misses = result
    true = case.meta["cells"]
    assert Counter((c.op, c.hidden, c.kernel) for c in cells) == Counter(
        (_kind(t), t["hidden_channels"], _kernel(t)) for t in true if is_replaced(t)
    )
    for cell in cells:
        candidates = [t for t in true if (t["hidden_channels"], _kernel(t)) == (cell.hidden, cell.kernel)]
        wanted = [NOTES[need] for t in candidates for need in t["needs"] if need in NOTES]
        assert [cell.note] * len(wanted) == wanted or (not wanted and cell.note is None)
    refused = [t for t in true if not is_replaced(t)]
    assert Counter((m.kind, m.hidden, m.kernel) for m in misses) == Counter(
        (_kind(t), t["hidden_channels"], tuple(t["kernel"])) for t in refused
    )
    for miss, t in zip(misses, refused, strict=True):
        reasons = [REASONS[need] for need in t["needs"] if need in REASONS] or ["made inside the graph"]
        assert any(reason in miss.reason for reason in reasons), f"{miss.reason}, and the truth is: {t['why']}"


@pytest.mark.parametrize(
    ("need", "attributes"),
    [
        ("linear_before_reset", {"reset": "after", "note": "update gate negated"}),
        ("peephole", {"peephole": True}),
        ("hard_gates", {"gates": "hard"}),
    ],
)
def test_variants_of_the_ops(need: str, attributes: dict[str, object]) -> None:
    cases = [case for case in CASES if any(need in cell["needs"] for cell in case.meta["cells"])]
    for case in cases:
        opset = next(item.version for item in case.model.opset_import if item.domain == "")
        model = case.model if opset >= 18 else onnx.version_converter.convert_version(case.model, 18)
        for cell in _find(model)[0]:
            assert {name: getattr(cell, name) for name in attributes} == attributes, case.name
    assert cases or need == "hard_gates", "of these only the recorded files have one"


def test_states_of_cells_are_the_true_pairs(case: Case, model: onnx.ModelProto) -> None:
    cells, graph = _find(model)
    for before, after in (state for cell in cells for state in cell.states):
        names = {after.name} | {node.outputs[0].name for node in after.consumers() if node.op_type == "Identity"}
        if before in graph.inputs and after in graph.outputs and before.name in case.pairs:
            assert case.pairs[str(before.name)] in names
        elif before in graph.inputs and case.pairs:  # chained cells: the state goes on to the next one
            assert before.name in case.pairs


def test_same_numbers_at_every_step(case: Case, result: Result) -> None:
    got = run(result[0], case.frames, case.states, case.pairs)
    worst, where = worst_difference(got, case.expected)
    assert worst <= case.tolerance, f"{where}: off by {worst:.1e}, more than {case.tolerance:.0e}"


def test_gates_of_a_replaced_cell_are_gone(case: Case, model: onnx.ModelProto, result: Result) -> None:
    cells, _ = _find(model)
    gates = {node.name for cell in cells for node in _gates(cell)}
    left = {node.name for node in result[0].graph.node if node.op_type in GATES}
    assert len(gates) >= 2 * len(cells)
    assert not gates & left or READ_ELSEWHERE & set(case.meta["tags"])


def test_normalising_changes_nothing(case: Case, model: onnx.ModelProto) -> None:
    copy = ir.from_proto(model)
    normalise(copy)
    inputs = {**case.frames[0], **case.states}
    before, after = (run(m, [inputs], {}, {}) for m in (model, ir.to_proto(copy)))
    worst, where = worst_difference(after, before)
    assert worst <= case.tolerance / 10, f"{where}: off by {worst:.1e}"


def _find(model: onnx.ModelProto) -> tuple[list[RecognisedCell], ir.Graph]:
    copy = ir.from_proto(model)
    normalise(copy)
    found: tuple[list[RecognisedCell], list[NearMiss]] = find_cells(copy)
    return found[0], copy.graph


def _kind(true: dict[str, str]) -> str:
    """The op; the records add what is special about a cell in brackets."""
    return true["kind"].split()[0]


def _kernel(true: dict[str, object]) -> tuple[int, ...]:
    """The op's kernel; a dilated 3x3 one becomes 5x5 with zeros between."""
    return (5, 5) if "candidate dilation" in true["needs"] else tuple(true["kernel"])  # type: ignore[operator,arg-type]


def _gates(cell: RecognisedCell) -> list[ir.Node]:
    """The activations on the way from the new states back to the old ones and the convolutions."""
    stop = {before for before, _ in cell.states}
    waiting = [after for _, after in cell.states]
    found: list[ir.Node] = []
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.op_type == "Conv" or node in found:
            continue
        if node.op_type in GATES:
            found.append(node)
        waiting.extend(v for v in node.inputs if v is not None and v not in stop)
    return found
