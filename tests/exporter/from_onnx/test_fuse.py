"""Fusing of ONNX files: recorded files of other exporters (see `cases`), and small ones written here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from stepcell import StepLoop
from stepcell.errors import ExportError, ParityError, UsageError
from stepcell.exporter.from_onnx.fuse import FuseReport, fuse
from stepcell.exporter.from_onnx.onnx_file import read_onnx_file
from stepcell.exporter.from_onnx.pairs import Pair
from stepcell.exporter.from_onnx.sizes import find_sizes
from stepcell.exporter.onnx_session import OnnxSession
from stepcell.exporter.size_rules import Rule, rules
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions
from tests.exporter.from_onnx.cases import RECORDED, Case, find_cases, is_replaced

# The zeros of this one are made at one size inside the graph, while its file calls the sizes dynamic.
NEEDS_SHAPE = {"nm_stateless_zeros_ts"}

Array = NDArray[Any]


@pytest.mark.parametrize("case", find_cases(), ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path) -> None:
    truth, shapes = case.meta, {}
    if case.name in NEEDS_SHAPE:
        with pytest.raises(ExportError, match="at none of the sizes that were tried"):
            fuse(case.path / "model.onnx", tmp_path / "fused.onnx")
        shapes = {each["name"]: each["shape"] for each in truth["data_inputs"]}
    report = fuse(case.path / "model.onnx", tmp_path / "fused.onnx", shapes=shapes)
    contract = report.contract
    assert {state.original_input: state.original_output for state in contract.states} == case.pairs
    data = {each["name"] for each in truth["data_inputs"]}
    assert [spec.name for spec in contract.inputs] == [v.name for v in case.model.graph.input if v.name in data]
    assert {spec.name for spec in contract.outputs} == set(truth["data_outputs"])
    fused = [(cell.op, cell.hidden, cell.kernel) for cell in contract.cells if cell.op]
    assert sorted(fused) == sorted(_op(cell) for cell in truth["cells"] if is_replaced(cell))
    left = [(cell.hidden, cell.kernel) for cell in contract.cells if not cell.op]
    assert sorted(left) == sorted(_op(cell)[1:] for cell in truth["cells"] if not is_replaced(cell))
    assert all(cell.reason for cell in contract.cells if cell.op is None)
    assert contract.parity is not None
    assert contract.parity.steps == (100 if contract.states else 10)
    error, where = _replay(case, tmp_path / "fused.onnx")
    assert error <= case.tolerance, f"{where}: {error:.2e}"


def _op(cell: dict[str, Any]) -> tuple[str, int, tuple[int, ...]]:
    """The op that a recorded cell becomes; a dilated 3x3 kernel becomes a 5x5 one with zeros between."""
    kernel = (5, 5) if "candidate dilation" in cell["needs"] else tuple(cell["kernel"])
    return f"stepcell::{cell['kind'].split()[0]}", cell["hidden_channels"], kernel


def _replay(case: Case, fused: Path) -> tuple[float, str]:
    """The recorded frames through StepLoop: worst error relative to max(1, |value|), and where."""
    worst = (0.0, "")
    with StepLoop.open(fused, keep_float16=True) as loop:
        originals = {str(state.original_output): state.name for state in loop.contract.states}
        sizes = loop.contract.bind({name: array.shape for name, array in case.frames[0].items()})
        init = {state.name: case.states[str(state.original_input)] for state in loop.contract.states}
        loop.load_state({n: np.broadcast_to(init[n], shape) for n, shape in loop.contract.state_shapes(sizes).items()})
        for t, (frame, expected) in enumerate(zip(case.frames, case.expected, strict=True)):
            outputs, states = loop.step(**frame), loop.state()
            for name, truth in expected.items():
                value = outputs[name] if name in outputs else states[originals[name]]
                worst = max(worst, (_error(value, truth), f"{name}, step {t}"))
    return worst


def _error(value: Array, truth: Array) -> float:
    assert value.shape == truth.shape
    wide = truth.astype(np.float64)
    return float(np.abs(value.astype(np.float64) - wide).max() / max(1.0, np.abs(wide).max()))


GRU = """
<ir_version: 6, opset_import: ["" : {opset}]>
gru (float[{sizes_x}] {x}, float[{sizes_h}] {before}) => (float[{sizes_h}] {after})
<float[4,7,3,3] wz = {{ {wz} }}, float[4,7,3,3] wr = {{ {wr} }}, float[4,7,3,3] wn = {{ {wn} }}, float one = {{ 1.0 }}>
{{
  xh = Concat <axis = 1> ({x}, {before})
  az = Conv <pads = [1, 1, 1, 1]> (xh, wz)
  z = Sigmoid (az)
  ar = Conv <pads = [1, 1, 1, 1]> (xh, wr)
  r = Sigmoid (ar)
  rh = Mul (r, {before})
  xrh = Concat <axis = 1> ({x}, rh)
  an = Conv <pads = [1, 1, 1, 1]> (xrh, wn)
  n = Tanh (an)
  keep = Sub (one, z)
  old = Mul (keep, {before})
  new = Mul (z, n)
  {after} = Add (old, new)
}}
"""


def gru(path: Path, **changes: Any) -> Path:
    """A ConvGRU of 4 channels, one number per weight, as another program would write it."""
    rng = np.random.default_rng(0)
    weights = {name: ", ".join(f"{v:.3f}" for v in rng.uniform(-0.3, 0.3, 4 * 7 * 9)) for name in ("wz", "wr", "wn")}
    sizes = {"sizes_x": "batch,3,height,width", "sizes_h": "batch,4,height,width"}
    names = {"x": "x", "before": "h", "after": "h_next", "opset": 18}
    onnx.save(onnx.parser.parse_model(GRU.format(**{**weights, **sizes, **names, **changes})), path)
    return path


def shape_of(report: FuseReport) -> tuple[int | str, ...]:
    return report.contract.states[0].shape


def test_a_cell_becomes_one_node_and_the_contract_says_all(tmp_path: Path) -> None:
    report = fuse(gru(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (report.nodes_before, report.nodes_after) == (13, 1)
    contract = report.contract
    assert contract.family == "adopted"
    assert contract.inputs[0].layout == "NCHW"
    assert shape_of(report) == ("batch", 4, "height", "width")
    assert contract.example == {"batch": 1, "height": 256, "width": 384}
    assert set(contract.source) >= {"onnx_sha256", "producer", "stepcell", "onnx", "opset", "original_opset"}
    assert contract.parity is not None
    assert contract.parity.reference == "the original file in ONNX Runtime"
    assert contract.parity.arithmetic == "float32 in ONNX Runtime"
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"), full_check=True)


def halved(source: Path) -> Path:
    """The file with every float in float16."""
    model = onnx.load(source)
    constants = [a.t for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    path = source.with_name("half.onnx")
    onnx.save(model, path)
    return path


def test_a_float16_file_is_computed_as_it_is_written(tmp_path: Path) -> None:
    report = fuse(halved(gru(tmp_path / "a.onnx")), tmp_path / "b.onnx")
    assert len(report.fused) == 1
    parity = report.contract.parity
    assert parity is not None
    assert parity.reference == "the original file in float64"
    assert parity.arithmetic == "float16 as written, accumulated in float32"
    assert 1e-5 < max(parity.max_abs_error.values()) < 2e-2


def test_an_old_opset_is_converted_for_a_cell_and_else_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = fuse(gru(tmp_path / "a.onnx", opset=11), tmp_path / "b.onnx")
    assert (report.contract.source["original_opset"], report.contract.source["opset"]) == (11, 18)
    assert len(report.fused) == 1

    def fail(*_: object) -> None:
        raise RuntimeError("No adapter for Conv")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    report = fuse(tmp_path / "a.onnx", tmp_path / "c.onnx")
    assert not report.fused
    assert report.contract.source["opset"] == 11
    assert "1 cell(s) stay as they are: the ops need opset 18, the file has 11" in report.notes[0]
    assert [state.name for state in report.contract.states] == ["h"]


def test_metadata_and_weights_listed_as_inputs(tmp_path: Path) -> None:
    model = onnx.load(gru(tmp_path / "a.onnx"))
    model.metadata_props.add(key="author", value="somebody")
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "a.onnx")
    report = fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [spec.name for spec in report.contract.inputs] == ["x"]
    assert {entry.key for entry in onnx.load(tmp_path / "b.onnx").metadata_props} == {"author", "stepcell.contract"}


def test_a_result_under_two_names_and_a_state_that_passes_through(tmp_path: Path) -> None:
    model = onnx.load(gru(tmp_path / "a.onnx"))
    for name, source in (("y", "h_next"), ("last_x", "x")):
        model.graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, 1, ["batch", 4 if name == "y" else 3, "height", "width"])
        )
    model.graph.input.append(onnx.helper.make_tensor_value_info("prev_x", 1, ["batch", 3, "height", "width"]))
    model.graph.node.append(onnx.helper.make_node("Sub", ["x", "prev_x"], ["motion"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("motion", 1, ["batch", 3, "height", "width"]))
    onnx.save(model, tmp_path / "a.onnx")
    report = fuse(tmp_path / "a.onnx", tmp_path / "b.onnx", states={"prev_x": "last_x"})
    assert [state.name for state in report.contract.states] == ["h", "prev_x"]
    frames = np.random.default_rng(0).uniform(-1, 1, (3, 1, 3, 5, 6)).astype(np.float32)
    with StepLoop.open(tmp_path / "b.onnx") as loop:
        for t, frame in enumerate(frames):
            outputs = loop.step(x=frame)
            np.testing.assert_array_equal(outputs["motion"], frame - frames[t - 1] if t else frame)
            np.testing.assert_array_equal(outputs["y"], loop.state()["h"])


@pytest.mark.parametrize(
    ("sizes_x", "sizes_h", "expected"),
    [
        ("?,3,?,?", "?,4,?,?", ("batch", 4, "height", "width")),
        ("1,3,?,?", "1,4,?,?", (1, 4, "height", "width")),
        ("batch,3,height,width", "b,4,h,w", ("batch", 4, "height", "width")),
        ("batch,3,height,width", "b,channels,s,s", ("batch", 4, "height", "width")),
        ("2,3,5,6", "2,4,5,6", (2, 4, 5, 6)),
    ],
)
def test_sizes_are_named_and_derived(
    tmp_path: Path, sizes_x: str, sizes_h: str, expected: tuple[int | str, ...]
) -> None:
    source = gru(tmp_path / "a.onnx", sizes_x=sizes_x, sizes_h=sizes_h)
    assert shape_of(fuse(source, tmp_path / "b.onnx")) == expected


def test_given_sizes_are_fixed(tmp_path: Path) -> None:
    source = gru(tmp_path / "a.onnx")
    report = fuse(source, tmp_path / "b.onnx", shapes={"x": (2, 3, 5, 6)})
    assert shape_of(report) == (2, 4, 5, 6)
    assert report.contract.example == {}
    for shapes, message in (
        ({"g": (1,)}, "--shape g: the model has no such input"),
        ({"x": (1, 4, 5, 6)}, "--shape x: expected"),
        ({"x": (1, 3, 5)}, "--shape x: expected"),
    ):
        with pytest.raises(UsageError, match=message):
            fuse(source, tmp_path / "b.onnx", shapes=shapes)


def test_names_of_sizes_that_are_no_symbols(tmp_path: Path) -> None:
    model = onnx.load(gru(tmp_path / "a.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in ((0, "batch size"), (2, "2*h"), (3, "class")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(model, tmp_path / "a.onnx")
    assert shape_of(fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")) == ("batch", 4, "height", "width")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule("s", stride=4), "s // 4"),
        (Rule("s", offset=2, stride=4), "(s + 2) // 4"),
        (Rule("s", offset=-6), "s - 6"),
        (Rule("s", factor=2), "s * 2"),
        (Rule("s", offset=7, stride=8, factor=8), "(s + 7) // 8 * 8"),
        (Rule(None, known=7), 7),
    ],
)
def test_rules_are_found_again(rule: Rule, text: int | str) -> None:
    samples = [{"b": b, "s": s} for b, s in ((1, 16), (2, 24), (1, 33), (2, 51), (1, 23), (2, 78), (3, 101))]
    found = rules([rule.at(sample) for sample in samples], samples, ["s", "b"])
    assert found[0].dim == text
    assert all(other.at(sample) == rule.at(sample) for other in found for sample in samples)


def test_one_size_says_nothing_about_a_rule() -> None:
    assert rules([8], [{"s": 32}], ["s"]) == []
    assert rules([8], [{}], []) == [Rule(None, known=8)]


def test_states_of_matting_follow_from_the_frame() -> None:
    path = RECORDED / "rvm_full_ts" / "model.onnx"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    file = read_onnx_file(path)
    run, pairs = OnnxSession(file.data, str(path)), [Pair(f"r{n}i", f"r{n}o", f"r{n}") for n in range(1, 5)]
    # Halved, then halved by one or more convolutions of stride 2 that round up.
    shapes = find_sizes(file, run, pairs, {}).shapes
    assert [shapes[f"r{n}i"][1:3] for n in range(1, 5)] == [
        (16, "(height + 2) // 4"),
        (20, "(height + 6) // 8"),
        (40, "(height + 14) // 16"),
        (64, "(height + 30) // 32"),
    ]
    shapes = find_sizes(file, run, pairs, {"src": (1, 3, 32, 48)}).shapes
    assert [shapes[f"r{n}o"] for n in range(1, 5)] == [(1, 16, 8, 12), (1, 20, 4, 6), (1, 40, 2, 3), (1, 64, 1, 2)]


def test_a_wrong_cell_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = gru(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    target.write_text("what was there")
    fuse_module = importlib.import_module("stepcell.exporter.from_onnx.fuse")
    right = fuse_module.replace_cells

    def wrong(model: Any, cells: Any) -> None:
        right(model, cells)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            value.const_value = fuse_module.ir.tensor(array[::-1].copy(), name=value.name)  # gates in reverse

    monkeypatch.setattr(fuse_module, "replace_cells", wrong)
    with pytest.raises(ParityError, match="differs from the original file"):
        fuse(source, target, overwrite=True)
    assert target.read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_state_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    model = onnx.load(gru(tmp_path / "a.onnx"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("c", 1, [1]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "k"))
    model.graph.node.append(onnx.helper.make_node("Identity", ["k"], ["c_next"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("c_next", 1, [1]))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="c: taken for a state, and changes no output") as caught:
        fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert str(caught.value.hint).endswith("only if it is data, new at every step: --state c=")
    assert len(fuse(tmp_path / "a.onnx", tmp_path / "b.onnx", states={"c": ""}).contract.states) == 1


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        ("jk_stack2_dynamo", {"x": (1, 3, 32, 48)}),
        ("ndrplz_two_layer_ts", {"x": (1, 4, 32, 48)}),
        ("openeb_lstm_reset_mask_ts", {}),
        ("nm_groupnorm_gru_dynamo", {}),
        ("rvm_decoder_dynamo", {}),
    ],
)
def test_tensorrt_builds_it(case: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    source = RECORDED / case / "model.onnx"
    if not source.is_file():
        pytest.skip(f"needs {source}")
    fuse(source, tmp_path / "b.onnx")
    build_engine(tmp_path / "b.onnx", tmp_path / "b.engine", BuildOptions(opt_shapes=shapes))
    assert (tmp_path / "b.engine").stat().st_size > 1000


def test_integers_booleans_and_a_state_that_sleeps_at_first(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    odd (float[1,3] x, int64[1] count, float[1,3] prev_x, bool[1] seen) =>
        (float[1,3] y, int64[1] count_next, float[1,3] next_x, bool[1] seen_next)
    <int64 one = {1}, bool[1] yes = {1}> {
      count_next = Add (count, one)
      next_x = Identity (x)
      factor = Cast <to = 1> (count)
      both = Cast <to = 1> (seen)
      scaled = Mul (factor, both)
      part = Mul (prev_x, scaled)
      y = Add (x, part)
      seen_next = Or (seen, yes)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    states = {"count": "count_next", "seen": "seen_next", "prev_x": "next_x"}
    onnx.save(onnx.parser.parse_model(text.replace("int64[1] count", "int64 count")), tmp_path / "scalar.onnx")
    assert fuse(tmp_path / "scalar.onnx", tmp_path / "c.onnx", states=states).contract.states[0].shape == ()
    contract = fuse(tmp_path / "a.onnx", tmp_path / "b.onnx", states=states).contract
    assert [(s.original_input, s.dtype, s.shape) for s in contract.states] == [
        ("count", "int64", (1,)),
        ("prev_x", "float32", (1, 3)),
        ("seen", "bool", (1,)),
    ]
    for name in ("b.onnx", "c.onnx"):  # c: the counter has no axes
        with StepLoop.open(tmp_path / name) as loop:
            got = [loop.step(x=np.full((1, 3), t, np.float32))["y"][0, 0] for t in range(5)]
        assert got == [0, 1 + 0 * 1, 2 + 1 * 2, 3 + 2 * 3, 4 + 3 * 4]


def test_streams_on_another_axis(tmp_path: Path) -> None:
    weights = ", ".join(["0.1"] * 64)
    text = f"""
    <ir_version: 8, opset_import: ["" : 18]>
    lstm (float[1,N,4] x, float[1,N,4] h0, float[1,N,4] c0) => (float[1,1,N,4] y, float[1,N,4] hn, float[1,N,4] cn)
    <float[1,16,4] W = {{ {weights} }}, float[1,16,4] R = {{ {weights} }}> {{
      y, hn, cn = LSTM <hidden_size = 4> (x, W, R, , , h0, c0)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    contract = fuse(tmp_path / "a.onnx", tmp_path / "b.onnx").contract
    assert [(s.name, s.original_output, s.batch_axis) for s in contract.states] == [("h", "hn", 1), ("c", "cn", 1)]
    with StepLoop.open(tmp_path / "b.onnx") as loop:
        loop.step(x=np.ones((1, 3, 4), np.float32))
        loop.reset(slots=[False, True, False])
        state = loop.state()["h"]
    assert not state[:, 1].any()
    assert state[:, [0, 2]].all()


def test_both_branches_of_a_flag_are_compared(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    branches (float[N,3] x, float[N,3] h, bool add) => (float[N,3] h_next) {
      h_next = If (add) <
        then_branch = t () => (float[N,3] a) { a = Add (x, h) },
        else_branch = e () => (float[N,3] b) { b = Sub (x, h) }
      >
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    file = read_onnx_file(tmp_path / "a.onnx")
    samples = find_sizes(file, OnnxSession(file.data, "a"), [Pair("h", "h_next", "h")], {}).samples
    assert [[bool(scalars["add"]) for scalars in sample.scalars] for sample in samples] == [[True, False]] * 2
    assert shape_of(fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")) == ("N", 3)
