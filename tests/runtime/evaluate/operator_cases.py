"""One-node models of every operator that exported, fused and foreign step models hold, with inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

__all__ = ["COMPOSED", "ELEMENTARY", "REORDERED", "OperatorCase"]

Array = NDArray[Any]
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class OperatorCase:
    """A node and its inputs. Floats have values of float16; `single` inputs stay float32, as the standard has them."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any]
    outputs: int
    opset: int
    single: tuple[int, ...]

    def __str__(self) -> str:
        attributes = ",".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.op}-{attributes}".replace(" ", "")

    def feeds(self, dtype: str) -> dict[str, Array]:
        """The inputs by name, floats in `dtype`."""
        return {
            f"i{place}": value.astype(dtype if value.dtype.kind == "f" and place not in self.single else value.dtype)
            for place, value in enumerate(self.inputs)
            if value is not None
        }

    def model(self, dtype: str) -> onnx.ModelProto:
        """The node as a model whose floats are of `dtype`; its outputs are o0, o1, ..."""
        feeds = self.feeds(dtype)
        names = [f"i{place}" if value is not None else "" for place, value in enumerate(self.inputs)]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
            for name, value in feeds.items()
        ]
        outputs = [onnx.ValueInfoProto(name=f"o{place}") for place in range(self.outputs)]
        node = helper.make_node(self.op, names, [output.name for output in outputs], **self.attributes)
        graph = helper.make_graph([node], "operator", inputs, outputs)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def case(
    op: str, *inputs: Any, outputs: int = 1, opset: int = 20, single: Sequence[int] = (), **attributes: Any
) -> OperatorCase:
    arrays = [None if value is None else np.asarray(value) for value in inputs]
    arrays = [a.astype(np.float16).astype(np.float32) if a is not None and a.dtype.kind == "f" else a for a in arrays]
    return OperatorCase(op, tuple(arrays), attributes, outputs, opset, tuple(single))


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape)


def scales(*values: float) -> Array:
    return np.array(values, np.float32)


X = floats(2, 4, 9, 11)
ROW = floats(4, 1, 11)
POSITIVE = np.abs(X) + 0.1
KERNEL, BIAS = floats(6, 4, 3, 3), floats(6)
UP = floats(4, 3, 3, 3)
WINDOWS: list[dict[str, Any]] = [
    {},
    {"pads": [1, 1, 1, 1]},
    {"strides": [2, 2], "pads": [1, 0, 2, 1]},
    {"dilations": [2, 1], "pads": [2, 2, 2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    {"auto_pad": "VALID"},
]
POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
]

# Operators that are one operation of numpy, in onnx.reference too: bit for bit alike in float16.
ELEMENTARY: list[OperatorCase] = [
    *(case(op, 3 * X) for op in ("Neg", "Abs", "Exp", "Sin", "Cos", "Tanh", "Erf", "Softplus", "Relu", "Sign")),
    *(case(op, 3 * X) for op in ("Floor", "Ceil", "Round", "Reciprocal", "Atan", "Sinh", "Cosh", "Elu", "Celu")),
    *(case(op, POSITIVE) for op in ("Sqrt", "Log")),
    *(case(op, X, ROW) for op in ("Add", "Sub", "Mul", "Max", "Min", "PRelu")),
    case("Div", X, np.abs(ROW) + 0.1),
    case("Pow", POSITIVE, ROW),
    case("Mod", X, np.abs(ROW) + 0.1, fmod=1),
    case("Mod", np.arange(-8, 8), [3]),
    case("Div", np.arange(-8, 8), [3]),
    case("Max", X, X + 1, -X),
    case("Sum", X, X),
    case("Clip", X, np.float32(-0.5), np.float32(0.7)),
    case("Clip", X, None, np.float32(0.7)),
    case("QuantizeLinear", 3 * X, np.float32(0.03125), np.int8(0)),
    case("QuantizeLinear", 3 * X, np.float32(0.03125)),  # uint8
    case("QuantizeLinear", 3 * X, scales(0.0625, 0.5, 0.125, 1), np.zeros(4, np.int8), axis=1),
    case("DequantizeLinear", np.arange(-128, 128).reshape(4, 64).astype(np.int8), np.float32(0.03125), np.int8(3)),
    case("DequantizeLinear", np.arange(-96, 96).reshape(2, 4, 24).astype(np.int32), scales(0.5, 1, 2, 0.25), axis=1),
    case("Clip", X, min=-0.5, max=0.25, opset=6),
    *(case(op, np.round(X), np.round(ROW)) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case(op, X > 0, ROW > 0) for op in ("And", "Or", "Xor")),
    case("Not", X > 0),
    *(case("Cast", 10 * X, to=to) for to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)),
    *(case("Cast", 10 * X, to=to) for to in (TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE)),
    case("Cast", np.arange(5), to=TensorProto.FLOAT16),
    case("CastLike", X, np.arange(3)),
    case("Identity", X),
    case("Where", X > 0, X, ROW),
    case("Concat", X, X[:, :2], axis=1),
    case("Reshape", X, [0, -1, 11]),
    case("Flatten", X, axis=-1),
    case("Transpose", X, perm=[0, 2, 3, 1]),
    case("Transpose", X),
    case("Squeeze", X[:, :1], [1]),
    case("Squeeze", X[:1, :1]),
    case("Squeeze", X[:, :1], axes=[1], opset=11),
    case("Unsqueeze", X, [0, -1]),
    case("Expand", X[:, :1], [4, 1, 1]),
    case("Tile", X, [1, 2, 1, 3]),
    case("Split", X, axis=1, num_outputs=2, outputs=2),
    case("Split", X, [1, 3], axis=1, outputs=2),
    case("Split", X, axis=3, num_outputs=3, outputs=3),
    case("Split", X, axis=1, split=[1, 3], outputs=2, opset=11),
    case("Slice", X, [1, -4], [9, -1], [2, 3]),
    case("Slice", X, [-1], [-100], [3], [-2]),
    case("Slice", X, [1, 1], [2**62, 4]),
    case("Slice", X, starts=[1], ends=[5], axes=[2], opset=9),
    case("Gather", X, [0, 2, -1], axis=1),
    case("Gather", X, 1, axis=2),
    case("GatherElements", X, RNG.integers(0, 9, (2, 4, 5, 11)), axis=2),
    case("GatherND", X, [[0, 1], [1, 3]]),
    case("GatherND", X, [[[1]], [[3]]], batch_dims=1),
    case("ScatterND", X, [[0, 1], [1, 3]], floats(2, 9, 11)),
    case("ScatterElements", X, RNG.permutation(9)[:5].reshape(1, 1, 5, 1), floats(1, 1, 5, 1), axis=2),
    case("DepthToSpace", X, blocksize=2),
    case("DepthToSpace", X, blocksize=2, mode="CRD"),
    case("SpaceToDepth", floats(2, 4, 8, 6), blocksize=2),
    *(case("Pad", X, [0, 0, 1, 2, 0, 0, 3, 4], mode=mode) for mode in ("constant", "reflect", "edge", "wrap")),
    case("Pad", X, [1, 2], np.float32(2), [3]),
    case("Pad", X, pads=[0, 0, 1, 1, 0, 0, 2, 2], value=1.5, opset=10),
    *(case(op, X, [2, 3]) for op in ("ReduceMax", "ReduceMin")),
    *(case(op, X, axis=1) for op in ("ArgMax", "ArgMin")),
    case("TopK", X, [3], axis=1, outputs=2),
    case("OneHot", [0, 3, 1], 5, scales(0, 2)),
    case("Trilu", X, 1),
    case("NonZero", np.round(X)),
    case("Shape", X, start=1),
    case("Size", X),
    case("Range", np.float32(0), np.float32(5), np.float32(0.5)),
    case("ConstantOfShape", [2, 3]),
    *(case("MaxPool", X, **pool) for pool in POOLS),
    case("GlobalMaxPool", X),
    # products without a bias: accumulated in float32 on both sides, and rounded once
    case("MatMul", floats(3, 5), floats(5, 4)),
    case("MatMul", floats(2, 3, 5), floats(5, 4)),
    case("Gemm", floats(5, 3), floats(5, 4), transA=1),
    case("ConvTranspose", X, floats(4, 3, 2, 2), strides=[2, 2]),
    *(
        case("Resize", X, None, factors, mode="nearest", coordinate_transformation_mode=mapping, single=[2])
        for mapping in ("half_pixel", "pytorch_half_pixel", "asymmetric")
        for factors in (scales(1, 1, 2, 2), scales(1, 1, 0.6, 0.5))
    ),
    *(
        case("Resize", X, None, None, [2, 4, 13, 5], mode="nearest", nearest_mode=mode)
        for mode in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    *(
        case("GridSample", X, 0.4 * floats(2, 5, 6, 2), mode="nearest", padding_mode=padding)
        for padding in ("zeros", "border", "reflection")
    ),
]

# Operators that onnx.reference computes in several steps, each rounded to float16: their float16 result is the
# reference's float32 result, rounded once.
COMPOSED: list[OperatorCase] = [
    *(case(op, 3 * X) for op in ("Sigmoid", "Softsign", "LeakyRelu", "ThresholdedRelu", "Selu", "HardSigmoid")),
    *(case(op, 3 * X) for op in ("HardSwish", "Mish")),
    case("LeakyRelu", X, alpha=0.1),
    case("Mean", X, X, X),
    *(
        case(op, X, [2, 3], keepdims=keep)
        for op in ("ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
        for keep in (0, 1)
    ),
    case("ReduceMean", X, axes=[2, 3], opset=11),
    case("ReduceMean", X),
    case("ReduceLogSumExp", X, [1]),
    case("ReduceLogSum", POSITIVE, [1]),
    case("CumSum", X, 1),
    case("Gemm", floats(3, 5), floats(4, 5), floats(4), transB=1, alpha=0.5, beta=2.0),
    *(
        case("ConvTranspose", X, UP, floats(3), **window)
        for window in (
            {},
            {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
            {"dilations": [2, 2]},
            {"strides": [3, 3], "pads": [1, 0, 0, 1]},
            {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        )
    ),
    case("ConvTranspose", floats(1, 2, 7), floats(2, 3, 4), strides=[2]),
    *(case("AveragePool", X, **pool) for pool in POOLS),
    *(case("AveragePool", X, count_include_pad=1, **pool) for pool in POOLS if "pads" in pool),
    case("GlobalAveragePool", X),
    case("BatchNormalization", X, floats(4), floats(4), floats(4), floats(4) ** 2 + 0.1),
    case("InstanceNormalization", X, floats(4), floats(4)),
    case("GroupNormalization", X, floats(4), floats(4), num_groups=2, opset=21),
    case("LayerNormalization", X, floats(11), floats(11)),
    case("LayerNormalization", X, floats(9, 11), axis=2),
    case("RMSNormalization", X, floats(11), opset=23),
    case("LpNormalization", X, axis=1),
    case("Softmax", X, axis=1),
    case("LogSoftmax", X, axis=1),
    *(
        case("GridSample", X, 0.6 * floats(2, 5, 6, 2), mode="linear", padding_mode=padding, align_corners=aligned)
        for padding in ("zeros", "border")
        for aligned in (0, 1)
    ),
    *(
        case(
            op,
            floats(6, 2, 3),
            floats(1 + (way == "bidirectional"), gates * 5, 3),
            floats(1 + (way == "bidirectional"), gates * 5, 5),
            floats(1 + (way == "bidirectional"), 2 * gates * 5),
            None,
            floats(1 + (way == "bidirectional"), 2, 5),
            hidden_size=5,
            direction=way,
            outputs=2,
        )
        for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))
        for way in ("forward", "reverse", "bidirectional")
    ),
    case("GRU", floats(6, 2, 3), floats(1, 15, 3), floats(1, 15, 5), hidden_size=5, linear_before_reset=1, outputs=2),
    case("GRU", floats(2, 6, 3), floats(1, 15, 3), floats(1, 15, 5), hidden_size=5, layout=1, outputs=2),
    case(
        "LSTM",
        floats(6, 2, 3),
        floats(1, 20, 3),
        floats(1, 20, 5),
        *(None, None, None),
        floats(1, 2, 5),
        floats(1, 15),
        hidden_size=5,
        outputs=3,
    ),
]

# As COMPOSED, but sums in another order, so what is close to the middle of two floats may be rounded the other way.
REORDERED: list[OperatorCase] = [
    *(case("Conv", X, KERNEL, BIAS, **window) for window in WINDOWS),
    *(case("Conv", X, KERNEL, **window) for window in WINDOWS),
    case("Conv", X, floats(6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    case("Conv", X, floats(4, 1, 3, 3), floats(4), group=4, pads=[1, 1, 1, 1]),
    case("Conv", X, floats(8, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    case("Conv", X, floats(6, 4, 1, 1)),
    case("Conv", X, floats(6, 4, 1, 1), strides=[2, 2]),
    case("Conv", X, floats(6, 4, 1, 5), pads=[0, 2, 0, 2]),
    case("Conv", floats(2, 3, 20), floats(5, 3, 4), strides=[2]),
    case("Conv", floats(1, 2, 5, 6, 7), floats(3, 2, 3, 3, 2), pads=[1] * 6),
    case("Gelu", POSITIVE),  # where the reference in float32 does not cancel digits
    case("Gelu", X, approximate="tanh"),
    case("HardSigmoid", 3 * X, alpha=1 / 6, beta=0.5),
    case("Einsum", floats(2, 3, 4), floats(2, 4, 5), equation="bij,bjk->bik"),
    *(
        case("Resize", X, None, factors, mode="linear", coordinate_transformation_mode=mapping, single=[2])
        for mapping in ("half_pixel", "pytorch_half_pixel", "asymmetric")
        for factors in (scales(1, 1, 2, 2), scales(1, 1, 0.6, 0.5))
    ),
    case("Resize", X, None, None, [2, 4, 13, 5], mode="linear", coordinate_transformation_mode="align_corners"),
    case("Resize", X, None, scales(1, 1, 2, 2), mode="cubic", single=[2]),
    case("Resize", X, None, scales(1, 1, 0.5, 0.4), mode="linear", antialias=1, single=[2]),
    case("Resize", X, None, scales(2, 0.5), mode="linear", axes=[2, 3], single=[2]),
]
