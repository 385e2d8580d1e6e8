"""Every operator that is written for ncnn, against ONNX Runtime; and what must be refused."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray

from stepcell.runtime.backends.ncnn.convert import convert
from stepcell.runtime.backends.ncnn.graph import NotConvertible
from stepcell.runtime.backends.ncnn.net import Net
from stepcell.runtime.backends.ncnn.operators import WRITERS

pytestmark = pytest.mark.skipif(find_spec("ncnn") is None, reason="the package ncnn is not installed")

MAP = "1,12,9,10"  # of most inputs: 12 channels are no multiple of the 8 or 16 that ncnn packs together
# Shape of x, shape of the result, nodes from x (and w: weights, by shape) to y, weights.
CASES: dict[str, tuple[str, str, str, dict[str, tuple[int, ...]]]] = {
    "conv": (MAP, "1,16,9,10", "y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": (16, 12, 3, 3), "b": (16,)}),
    "conv, 16 to 32 channels": ("1,16,9,10", "1,32,9,10", "y = Conv<pads=[1,1,1,1]>(x, w)", {"w": (32, 16, 3, 3)}),
    "conv, strides": (
        MAP,
        "1,8,4,10",
        "y = Conv<pads=[1,2,0,2], strides=[2,1], dilations=[1,2]>(x, w)",
        {"w": (8, 12, 3, 3)},
    ),
    "conv, grouped": (MAP, "1,24,9,10", "y = Conv<group=3, pads=[0,1,2,1]>(x, w, b)", {"w": (24, 4, 3, 3), "b": (24,)}),
    "conv, depthwise": (MAP, "1,12,9,10", "y = Conv<group=12, pads=[1,1,1,1]>(x, w)", {"w": (12, 1, 3, 3)}),
    "conv, same": (MAP, "1,4,5,5", 'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', {"w": (4, 12, 3, 4)}),
    "conv, same lower": (MAP, "1,4,5,5", 'y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)', {"w": (4, 12, 3, 4)}),
    "transposed": (MAP, "1,5,18,20", "y = ConvTranspose<strides=[2,2]>(x, w, b)", {"w": (12, 5, 2, 2), "b": (5,)}),
    "transposed, padded": (
        MAP,
        "1,5,18,19",
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,0]>(x, w)",
        {"w": (12, 5, 3, 3)},
    ),
    "transposed, grouped": (MAP, "1,6,11,12", "y = ConvTranspose<group=3>(x, w)", {"w": (12, 2, 3, 3)}),
    "max pool": (MAP, "1,12,4,5", "y = MaxPool<kernel_shape=[3,2], strides=[2,2]>(x)", {}),
    "max pool, padded": (MAP, "1,12,9,10", "y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", {}),
    "average pool": (MAP, "1,12,9,10", "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", {}),
    "average pool, rounded up": (
        "1,12,8,10",
        "1,12,4,5",
        "y = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)",
        {},
    ),
    "average pool, with padding": (
        MAP,
        "1,12,9,10",
        "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)",
        {},
    ),
    "global pool": (MAP, "1,12,1,1", "y = GlobalAveragePool(x)", {}),
    "gemm": ("1,12", "1,7", "y = Gemm<transB=1, alpha=0.5>(x, w, b)", {"w": (7, 12), "b": (7,)}),
    "gemm, not transposed": ("1,12", "1,7", "y = Gemm<beta=2.0>(x, w, b)", {"w": (12, 7), "b": (1, 7)}),
    "matrix product": ("1,5,12", "1,5,7", "y = MatMul(x, w)", {"w": (12, 7)}),
    "batch norm": (
        MAP,
        MAP,
        "y = BatchNormalization<epsilon=0.01>(x, w, b, m, p)",
        {"w": (12,), "b": (12,), "m": (12,), "p": (12,)},
    ),
    "instance norm": (MAP, MAP, "y = InstanceNormalization(x, w, b)", {"w": (12,), "b": (12,)}),
    "group norm": (MAP, MAP, "y = GroupNormalization<num_groups=4>(x, w, b)", {"w": (12,), "b": (12,)}),
    "layer norm": ("1,5,12", "1,5,12", "y = LayerNormalization(x, w, b)", {"w": (12,), "b": (12,)}),
    "softmax": (MAP, MAP, "y = Softmax<axis=1>(x)", {}),
    "prelu": (MAP, MAP, "y = PRelu(x, w)", {"w": (12, 1, 1)}),
    "concat": (MAP, "1,36,9,10", "t = Tanh(x)\n y = Concat<axis=1>(x, t, x)", {}),
    "concat of columns": (MAP, "1,12,9,20", "y = Concat<axis=-1>(x, x)", {}),
    "add, channels": (MAP, MAP, "y = Add(w, x)", {"w": (12, 1, 1)}),
    "subtract from channels": (MAP, MAP, "y = Sub(w, x)", {"w": (1, 12, 1, 1)}),
    "divide by columns": (MAP, MAP, "y = Div(x, p)", {"p": (10,)}),
    "a name for a tensor": (MAP, MAP, "t = Identity(x)\n y = Add(t, x)", {}),
    "broadcast": ("1,12,1,10", MAP, "y = Mul(x, w)", {"w": (12, 9, 1)}),
    "of rows": ("1,12", "1,12", "y = Mul(x, w)", {"w": (12,)}),
    "squeeze": (MAP, "1,12,90", "y = Reshape(x, shape)", {}),
    "depth to space": (MAP, "1,3,18,20", "y = DepthToSpace<blocksize=2>(x)", {}),
    "depth to space, CRD": (MAP, "1,3,18,20", 'y = DepthToSpace<blocksize=2, mode="CRD">(x)', {}),
    "space to depth": ("1,3,8,10", "1,12,4,5", "y = SpaceToDepth<blocksize=2>(x)", {}),
    "to columns": (MAP, "1,9,10,12", "y = Transpose<perm=[0,2,3,1]>(x)", {}),
    "from columns": (MAP, "1,10,12,9", "y = Transpose<perm=[0,3,1,2]>(x)", {}),
    "mean of channels": (MAP, "1,1,9,10", "y = ReduceMean(x, one)", {}),
    "maximum of rows": (MAP, "1,12,1,10", "y = ReduceMax(x, two)", {}),
    "minimum of channels": (MAP, "1,1,9,10", "y = ReduceMin(x, one)", {}),
    "global maximum": (MAP, "1,12,1,1", "y = GlobalMaxPool(x)", {}),
    "flatten": (MAP, "1,1080", "y = Flatten(x)", {}),
    "take an axis away": ("1,12,1,10", "1,12,10", "y = Squeeze(x, two)", {}),
    "logarithm": (MAP, MAP, "t = Exp(x)\n y = Log(t)", {}),
    "square root": (MAP, MAP, "t = Abs(x)\n y = Sqrt(t)", {}),
    "reciprocal": (MAP, MAP, "t = Exp(x)\n y = Reciprocal(t)", {}),
    "power": (MAP, MAP, "t = Exp(x)\n y = Pow(t, half)", {}),
    "sum of maps": (MAP, "1,12", "y = ReduceSum<keepdims=0>(x, maps)", {}),
    "less the mean of all": (MAP, MAP, "t = ReduceMean(x, all)\n y = Sub(x, t)", {}),
}
for _name in ("Sigmoid", "Tanh", "Relu", "LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "HardSwish", "Softplus"):
    CASES[_name] = (MAP, MAP, f"y = {_name}(x)", {})
for _name in ("Mish", "Erf", "Gelu", "Abs", "Neg", "Floor", "Ceil", "Exp", "Sin", "Cos", "Round", "Sign"):
    CASES[_name] = (MAP, MAP, f"y = {_name}(x)", {})
for _name in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
    CASES[f"{_name} a number"] = (MAP, MAP, f"y = {_name}(half, x)", {})
    CASES[f"{_name} two"] = (MAP, MAP, f"t = Exp(x)\n y = {_name}(x, t)", {})
SMALL = "half = Constant<value_float=0.5>()\n one = Constant<value_ints=[1]>()\n maps = Constant<value_ints=[2,3]>()\n"
SMALL += " all = Constant<value_ints=[1,2,3]>()\n"
SMALL += " two = Constant<value_ints=[2]>()\n"
SMALL += " shape = Constant<value_ints=[1,12,90]>()\n"
RANGES = {"p": (0.5, 2.0)}


def model(case: str, x: str, y: str, nodes: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    rng = np.random.default_rng(len(case))
    text = f'<ir_version: 10, opset_import: ["": 22]> m (float[{x}] x) => (float[{y}] y) {{ {SMALL}{nodes} }}'
    parsed = onnx.parser.parse_model(text)
    for name, shape in weights.items():
        array = rng.uniform(*RANGES.get(name, (-1.0, 1.0)), shape).astype(np.float32)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return folded(parsed)


def folded(parsed: onnx.ModelProto) -> onnx.ModelProto:
    """With constants as initializers, as ONNX Runtime leaves them."""
    for node in list(parsed.graph.node):
        if node.op_type == "Constant":
            array = np.array(onnx.helper.get_attribute_value(node.attribute[0]))
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            parsed.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
            parsed.graph.node.remove(node)
    used = {name for node in parsed.graph.node for name in node.input}
    kept = [tensor for tensor in parsed.graph.initializer if tensor.name in used]
    del parsed.graph.initializer[:]
    parsed.graph.initializer.extend(kept)
    return parsed


def in_ort(m: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0]
    return result


def in_ncnn(m: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    net = Net(convert(m), 1)
    matrix, view = net.matrix("x")
    view[...] = x.reshape(view.shape)
    return net.values(net.step({"x": matrix}, ["y"], [])["y"])[None]


def compare(m: onnx.ModelProto, shape: str) -> None:
    x = np.random.default_rng(1).uniform(-2, 2, [int(size) for size in shape.split(",")]).astype(np.float32)
    expected, found = in_ort(m, x), in_ncnn(m, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str) -> None:
    x, y, nodes, weights = CASES[case]
    compare(model(case, x, y, nodes, weights), x)


@pytest.mark.parametrize(
    ("shape", "result", "op", "attributes", "constants"),
    [
        (MAP, "1,4,9,10", "Slice", {}, [[2], [-6], [1]]),
        (MAP, "1,12,6,9", "Slice", {}, [[-7, 1], [8, 99], [2, 3]]),
        (MAP, "1,12,12,13", "Pad", {}, [[0, 0, 1, 2, 0, 0, 2, 1], 0.5]),
        (MAP, "1,12,12,13", "Pad", {"mode": "reflect"}, [[0, 0, 1, 2, 0, 0, 2, 1]]),
        (MAP, "1,12,12,13", "Pad", {"mode": "edge"}, [[0, 0, 1, 2, 0, 0, 2, 1]]),
        (MAP, MAP, "Clip", {}, [-0.5, 1.25]),
        (MAP, "1,12,1,9,10", "Unsqueeze", {}, [[2]]),
        (MAP, "1,12,18,20", "Resize", {"mode": "linear"}, [None, None, [1, 12, 18, 20]]),
        (MAP, "1,12,5,17", "Resize", {"mode": "linear"}, [None, None, [1, 12, 5, 17]]),
        (
            MAP,
            "1,12,18,23",
            "Resize",
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            [None, None, [1, 12, 18, 23]],
        ),
        (MAP, "1,12,18,30", "Resize", {"mode": "nearest"}, [None, None, [1, 12, 18, 30]]),
        (
            MAP,
            "1,12,13,14",
            "Resize",
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
            [None, None, [1, 12, 13, 14]],
        ),
    ],
)
def test_operator_with_constants(
    shape: str, result: str, op: str, attributes: dict[str, Any], constants: list[Any]
) -> None:
    names = ["" if value is None else f"c{place}" for place, value in enumerate(constants)]
    nodes = [onnx.helper.make_node(op, ["x", *names], ["y"], **attributes)]
    tensors = []
    for name, value in zip(names, constants, strict=True):
        if name:
            array = np.array(value)
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            tensors.append(onnx.numpy_helper.from_array(array, name))
    compare(graph(nodes, shape, result, tensors), shape)


def graph(
    nodes: list[onnx.NodeProto], shape: str, result: str, tensors: list[onnx.TensorProto], kind: int = 1
) -> onnx.ModelProto:
    sizes = [[int(size) for size in text.split(",")] for text in (shape, result)]
    x, y = (onnx.helper.make_tensor_value_info(name, kind, size) for name, size in zip("xy", sizes, strict=True))
    body = onnx.helper.make_graph(nodes, "m", [x], [y], tensors)
    return onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_split_and_a_blob_with_many_readers() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> m (float[1,12,9,10] x) => (float[1,4,9,10] y) {
        a, b, c = Split<axis=1, num_outputs=3>(x)
        d = Sigmoid(a)
        e = Mul(a, b)
        f = Add(e, c)
        g = Add(f, a)
        y = Sub(g, d) }"""
    compare(onnx.parser.parse_model(text), MAP)


def test_pixels_in_the_graph() -> None:
    """Bytes of channels last become floats, and floats bytes again: exact."""
    text = """<ir_version: 10, opset_import: ["": 20]> m (uint8[1,6,7,3] x) => (uint8[1,6,7,3] y)
        <float a = {0.00392156862745098}, float b = {255.0}, float zero = {0.0}> {
        f = Cast<to=1>(x)
        c = Transpose<perm=[0,3,1,2]>(f)
        s = Mul(c, a)
        t = Mul(s, b)
        r = Round(t)
        k = Clip(r, zero, b)
        u = Cast<to=2>(k)
        y = Transpose<perm=[0,2,3,1]>(u) }"""
    m = onnx.parser.parse_model(text)
    x = np.arange(126, dtype=np.uint8).reshape(1, 6, 7, 3) * 2
    np.testing.assert_array_equal(in_ncnn(m, x), in_ort(m, x))


def test_round_is_half_to_even() -> None:
    m = model("Round", *CASES["Round"])
    x = np.zeros((1, 12, 9, 10), np.float32)
    x.reshape(-1)[:6] = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    np.testing.assert_array_equal(in_ncnn(m, x), in_ort(m, x))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = Concat<axis=0>(x, x)", "expected a known shape with 1 as its first size"),
        ("y = Conv<pads=[1,1,1,1]>(x, x)", "computed in the graph"),
        ("y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)", "a last window that is not whole"),
        ("y = Acos(x)", "operator Acos"),
        ("y = Transpose<perm=[1,0,2,3]>(x)", "first axis"),
        ("d = Cast<to=11>(x)\n e = Exp(d)\n y = Cast<to=1>(e)", "of type double"),
        ("i = Cast<to=3>(x)\n j = Add(i, i)\n y = Cast<to=1>(j)", "of type int8"),
        ("y = CumSum(x, one)", "operator CumSum"),
    ],
)
def test_what_cannot_be_computed_is_refused(nodes: str, reason: str) -> None:
    text = f'<ir_version: 10, opset_import: ["": 20]> m (float[1,3,3,3] x) => (float[N,C,H,W] y) {{ {SMALL}{nodes} }}'
    with pytest.raises(NotConvertible, match=reason):
        convert(folded(onnx.parser.parse_model(text)))


def test_names_of_a_file_are_not_in_the_network() -> None:
    """A name with a line feed would be layers of its own in ncnn's text."""
    text = (
        '<ir_version: 10, opset_import: ["": 20]> m (float[1,3,3,3] x) => (float[1,3,3,3] y) { t = Exp(x) y = Tanh(t) }'
    )
    m = onnx.parser.parse_model(text)
    for node in m.graph.node:
        node.name = "a\nb"
        node.input[:] = [f"{name}\n7767517" if name == "t" else name for name in node.input]
        node.output[:] = [f"{name}\n7767517" if name == "t" else name for name in node.output]
    found = convert(m)
    assert [line.split()[0] for line in found.param.splitlines()[2:]] == ["Input", "UnaryOp", "TanH"]


def test_every_writer_is_tested() -> None:
    tested = " ".join(nodes for _, _, nodes, _ in CASES.values())
    elsewhere = {"Slice", "Pad", "Clip", "Unsqueeze", "Resize", "Split", "Cast"}
    missing = {name for name in WRITERS if f"{name}(" not in tested and f"{name}<" not in tested} - elsewhere
    assert not missing
