"""Programs: constants, sizes, values that are freed, subgraphs, and files that other programs wrote."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

from stepcell.errors import EvaluationError
from stepcell.runtime.evaluate import program_of
from stepcell.runtime.evaluate.program import Program

Array = NDArray[Any]
FILES = sorted((Path(__file__).parents[2] / "data" / "onnx").glob("*/model.onnx"))


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')


def calls(program: Program) -> list[str]:
    """Operators that are computed at every step, for the sizes that came last."""
    plan, _ = list(program._plans.values())[-1]
    return [call.node.op for call in plan]


SIZES = """
g (float[N, C, H, W] x) => (float[N, C2, H2, W2] y) {
  two = Constant<value = int64[1] {2}>()
  hw = Shape<start = 2, end = 4>(x)
  larger = Mul(hw, two)
  nc = Shape<start = 0, end = 2>(x)
  sizes = Concat<axis = 0>(nc, larger)
  up = Resize<mode = "nearest">(x, , , sizes)
  one = Constant<value_float = 1.0>()
  three = Constant<value_float = 3.0>()
  four = Add(one, three)
  y = Mul(up, four)
}"""


def test_constants_are_folded_and_shapes_computed_once_for_each_size() -> None:
    program = program_of(parsed(SIZES))
    assert {node.op for node in program.nodes} == {"Shape", "Mul", "Concat", "Resize"}
    for height in (3, 5, 3, 7, 8, 9, 10):
        x = np.random.default_rng(height).random((1, 2, height, 4)).astype(np.float32)
        y = program.run({"x": x})["y"]
        assert calls(program) == ["Resize", "Mul"]
        assert np.array_equal(y, 4 * x.repeat(2, 2).repeat(2, 3))
    assert len(program._plans) <= 4


def test_a_shape_that_depends_on_values_is_not_kept() -> None:
    program = program_of(
        parsed("g (float[N] x) => (int64[M] y) { zero = Constant<value_int = 0>() n = NonZero(x) y = Shape(n) }")
    )
    assert program.run({"x": np.array([1, 0, 2, 0], np.float32)})["y"].tolist() == [1, 2]
    assert program.run({"x": np.array([1, 3, 2, 0], np.float32)})["y"].tolist() == [1, 3]


def test_a_size_that_is_an_input_is_not_kept() -> None:
    text = "g (float[N] x, int64[R] s) => (float[A, B] y, int64[R2] z) { y = Reshape(x, s) z = Shape(y) }"
    program = program_of(parsed(text))
    x = np.arange(6, dtype=np.float32)
    for shape in ([2, 3], [3, 2]):
        results = program.run({"x": x, "s": np.array(shape)})
        assert results["y"].shape == tuple(shape)
        assert results["z"].tolist() == shape


def test_values_are_freed_after_their_last_use() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Add(x, x) b = Add(a, a) c = Add(b, b) unused = Neg(a) y = Add(c, a) }"
    program = program_of(parsed(text))
    program.run({"x": np.ones(3, np.float32)})
    plan, _ = next(iter(program._plans.values()))
    # x and b end where they are read last; a lives to the end, and what nobody asks for is not computed
    assert [(call.node.outputs[0], sorted(call.last_use)) for call in plan] == [
        ("a", ["x"]),
        ("b", []),
        ("c", ["b"]),
        ("y", ["a", "c"]),
    ]


BRANCH = """
g (float[N] x, float[N] h, bool flag) => (float[N] y) {
  scale = Constant<value_float = 3.0>()
  y = If (flag) <
    then_branch = t () => (float[N] a) { a = Mul(h, scale) },
    else_branch = e () => (float[N] b) { square = Mul(h, h) b = Add(square, x) }
  >
}"""


def test_a_branch_reads_values_around_it_and_has_a_derivative() -> None:
    program = program_of(parsed(BRANCH), "float64")
    x, h, dh = np.array([1.0, 2.0]), np.array([3.0, 5.0]), np.array([1.0, 10.0])
    for flag, value, change in ((True, 3 * h, 3 * dh), (False, h * h + x, 2 * h * dh)):
        feeds = {"x": x, "h": h, "flag": np.array(flag)}
        assert np.array_equal(program.run(feeds)["y"], value)
        results, changes = program.run_jvp(feeds, {"h": dh})
        assert np.array_equal(results["y"], value)
        assert np.array_equal(changes["y"], change)


LOOP = """
g (float[N] x) => (float[N] last, float[T, N] every) {
  three = Constant<value_int = 3>()
  on = Constant<value = bool {1}>()
  last, every = Loop (three, on, x) <
    body = b (int64 i, bool go, float[N] h) => (bool go_on, float[N] new, float[N] seen) {
      go_on = Identity(go) new = Mul(h, x) seen = Add(new, new)
    }
  >
}"""


def test_a_loop_carries_values_and_stacks_what_it_sees() -> None:
    program = program_of(parsed(LOOP), "float64")
    x, dx = np.array([2.0, 3.0]), np.array([1.0, 10.0])
    results, changes = program.run_jvp({"x": x}, {"x": dx})
    assert np.array_equal(results["last"], x**4)
    assert np.array_equal(results["every"], np.stack([2 * x**2, 2 * x**3, 2 * x**4]))
    assert np.allclose(changes["last"], 4 * x**3 * dx, rtol=1e-15)
    assert np.allclose(changes["every"], np.stack([4 * x * dx, 6 * x**2 * dx, 8 * x**3 * dx]), rtol=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N] x) => (float[N] y) { y = other.Thing(x) }", "node 'y': operator other::Thing is not implemented"),
        ("g (float[N] x) => (float[N] y) { y = Bernoulli(x) }", "node 'y': operator Bernoulli is not implemented"),
        ("g (float[N] x) => (float[N] y) { y, i = MaxPool<kernel_shape = [2]>(x) }", "the indices of MaxPool"),
    ],
)
def test_what_is_not_implemented_is_named(text: str, message: str) -> None:
    model = parsed(text)
    model.opset_import.add(domain="other", version=1)
    with pytest.raises(EvaluationError, match=message):
        program_of(model).run({"x": np.ones((1, 1, 4), np.float32)})


def test_an_operator_of_an_optimised_file_says_where_it_comes_from() -> None:
    with pytest.raises(EvaluationError, match="FusedMatMul is not implemented") as caught:
        program_of(parsed("g (float[N,N] x) => (float[N,N] y) { y = com.microsoft.FusedMatMul(x, x) }"))
    assert "take the file as it was before" in str(caught.value.hint)


def test_arrays_that_do_not_fit_are_named_with_their_node() -> None:
    program = program_of(parsed("g (float[N] x, float[M] w) => (float[N] y) { y = Add(x, w) }"))
    with pytest.raises(EvaluationError, match=r"node 'y' \(Add\): ValueError.*inputs float32 \(3,\), float32 \(4,\)"):
        program.run({"x": np.ones(3), "w": np.ones(4)})


def in_onnx_runtime(data: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_files_of_other_exporters_equal_onnx_runtime_in_float32(path: Path) -> None:
    model, rng = onnx.load(path), np.random.default_rng(0)
    recorded = np.load(path.with_name("io.npz")) if path.with_name("io.npz").exists() else {}
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value or (2 if "batch" in dim.dim_param else 16) for dim in value.type.tensor_type.shape.dim]
        known = value.name in recorded and list(recorded[value.name].shape) == shape
        feeds[value.name] = np.asarray(recorded[value.name] if known else rng.random(shape), np.float32)
    expected = in_onnx_runtime(path.read_bytes(), feeds)
    for name, got in program_of(model).run(feeds).items():
        assert (got.shape, got.dtype) == (expected[name].shape, expected[name].dtype)
        assert np.allclose(got, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["silero_vad_16k_op15", "silero_vad_half"])
def test_a_speech_model_with_branches_and_an_lstm_equals_onnx_runtime(name: str) -> None:
    pytest.importorskip("silero_vad", reason="the package silero-vad is not installed")
    with resources.as_file(resources.files("silero_vad.data") / f"{name}.onnx") as path:
        data = path.read_bytes()
    model, rng = onnx.ModelProto.FromString(data), np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            feeds[value.name] = np.array(16000)
        elif len(dims) == 2:
            feeds[value.name] = rng.standard_normal((2, 576)).astype(np.float32)
        else:
            feeds[value.name] = rng.standard_normal((2, 2, 128)).astype(np.float32)
    expected, program = in_onnx_runtime(data, feeds), program_of(model)
    for _ in range(2):
        for output, got in program.run(feeds).items():
            assert np.allclose(got, expected[output], rtol=1e-4, atol=1e-4)
