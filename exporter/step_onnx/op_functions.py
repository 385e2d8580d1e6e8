"""Definitions of the ops as ONNX model-local functions of standard ops, for runtimes without the plugin.

Of several equal forms TensorRT fuses this one into the fewest kernels: one convolution over the
concatenation of x and h, its result split per gate, and each gate widened to float32 separately
(docs/op-contract.md has the counts). Weights are in the layout of the op; joining them is constant
arithmetic that ONNX Runtime and TensorRT do once, when they load the file.

A function cannot branch on an attribute, and TensorRT-RTX 1.7 ignores the `overload` field of
functions and silently uses the first one, so a file holds one variant of an op.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.parser

from stepcell.ops import CONV_GRU, CONV_LSTM, DOMAIN, OPS, VERSION, Op, OpName

__all__ = ["DOMAIN", "VERSION", "Variant", "function_for", "variant_of"]

_SOFT = {"sigmoid": "Sigmoid({0})", "tanh": "Tanh({0})"}
_HARD = {
    "sigmoid": "HardSigmoid<alpha: float = 0.5, beta: float = 0.5>({0})",
    "tanh": "Clip({0}, minus_one, one)",
}
_CONV = "Conv<pads: ints = @pads>"


@dataclass(frozen=True, order=True)
class Variant:
    """The op and the attributes that determine a function's body."""

    op: OpName
    gates: str = "soft"
    reset: str = "before"
    peephole: bool = False


def variant_of(node: onnx.NodeProto) -> Variant:
    """The variant of a node of the stepcell domain."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    gates = attributes["gates"].decode()
    op = OPS[node.op_type]
    if op is CONV_LSTM:
        return Variant(op.name, gates, peephole=len(node.input) == len(op.inputs_of("map")))
    return Variant(op.name, gates, reset=attributes["reset"].decode())


def function_for(variant: Variant, opset: int) -> onnx.FunctionProto:
    """The definition of one variant in standard ops of `opset` (18 or later)."""
    if variant.op == CONV_LSTM.name:
        text = _conv_lstm(variant)
    elif variant.reset == "after":
        text = _conv_gru_after(variant)
    else:
        text = _conv_gru_before(variant)
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {text}')


def _activations(variant: Variant) -> tuple[dict[str, str], str]:
    if variant.gates == "soft":
        return _SOFT, ""
    return (
        _HARD,
        "one = Constant<value_float: float = 1.0>()\n minus_one = Constant<value_float: float = -1.0>()\n",
    )


def _signature(op: Op, variant: str) -> str:
    """The head of a function, such as ConvGRU <pads, gates, reset> (x, h, W_x, b, W_h, W_n) => (h_next, y)."""
    attributes, inputs = ", ".join(["pads", *op.attributes]), ", ".join(op.inputs_of(variant))
    return f"{op.name} <{attributes}> ({inputs}) => ({', '.join(op.outputs)})"


# h is converted once to the compute dtype for the convolutions; everything after a convolution is
# float32. CastLike follows the dtypes of x and h, so one body serves every precision.


def _conv_gru_before(variant: Variant) -> str:
    act, constants = _activations(variant)
    return f"""
{_signature(CONV_GRU, "before")} {{
  {constants}
  zero = Constant<value: tensor = int64[1] {{0}}>()
  two_c = Shape<start: int = 0, end: int = 1>(W_h)
  three_c = Shape<start: int = 0, end: int = 1>(W_x)
  W_xg = Slice(W_x, zero, two_c, zero)
  W_xn = Slice(W_x, two_c, three_c, zero)
  b_g = Slice(b, zero, two_c, zero)
  b_n = Slice(b, two_c, three_c, zero)
  W_g = Concat<axis: int = 1>(W_xg, W_h)
  W_c = Concat<axis: int = 1>(W_xn, W_n)
  h_narrow = CastLike(h, x)
  h_wide = Cast<to: int = 1>(h)
  xh = Concat<axis: int = 1>(x, h_narrow)
  a_g = {_CONV}(xh, W_g, b_g)
  a_z, a_r = Split<axis: int = 1, num_outputs: int = 2>(a_g)
  a_z_wide = Cast<to: int = 1>(a_z)
  a_r_wide = Cast<to: int = 1>(a_r)
  z = {act["sigmoid"].format("a_z_wide")}
  r = {act["sigmoid"].format("a_r_wide")}
  rh_wide = Mul(r, h_wide)
  rh = CastLike(rh_wide, x)
  xrh = Concat<axis: int = 1>(x, rh)
  a_n = {_CONV}(xrh, W_c, b_n)
  a_n_wide = Cast<to: int = 1>(a_n)
  n = {act["tanh"].format("a_n_wide")}
  {_BLEND}
}}"""


def _conv_gru_after(variant: Variant) -> str:
    # Two convolutions, since the candidate needs both parts separately. One convolution with zeros in
    # its weight would save a kernel and cost a third more arithmetic.
    act, constants = _activations(variant)
    return f"""
{_signature(CONV_GRU, "after")} {{
  {constants}
  W_hh = Concat<axis: int = 0>(W_h, W_n)
  b_hn_wide = Cast<to: int = 1>(b_hn)
  axes = Constant<value: tensor = int64[2] {{1, 2}}>()
  b_hn_map = Unsqueeze(b_hn_wide, axes)
  h_narrow = CastLike(h, x)
  h_wide = Cast<to: int = 1>(h)
  a = {_CONV}(x, W_x, b)
  g = {_CONV}(h_narrow, W_hh)
  a_z, a_r, a_n = Split<axis: int = 1, num_outputs: int = 3>(a)
  g_z, g_r, g_n = Split<axis: int = 1, num_outputs: int = 3>(g)
  a_z_wide = Cast<to: int = 1>(a_z)
  a_r_wide = Cast<to: int = 1>(a_r)
  a_n_wide = Cast<to: int = 1>(a_n)
  g_z_wide = Cast<to: int = 1>(g_z)
  g_r_wide = Cast<to: int = 1>(g_r)
  g_n_wide = Cast<to: int = 1>(g_n)
  s_z = Add(a_z_wide, g_z_wide)
  s_r = Add(a_r_wide, g_r_wide)
  z = {act["sigmoid"].format("s_z")}
  r = {act["sigmoid"].format("s_r")}
  c_n = Add(g_n_wide, b_hn_map)
  r_c_n = Mul(r, c_n)
  s_n = Add(a_n_wide, r_c_n)
  n = {act["tanh"].format("s_n")}
  {_BLEND}
}}"""


_BLEND = """step = Sub(n, h_wide)
  scaled = Mul(z, step)
  blended = Add(h_wide, scaled)
  h_next = CastLike(blended, h)
  y = CastLike(blended, x)"""


def _conv_lstm(variant: Variant) -> str:
    act, constants = _activations(variant)
    before_c = after_c = ""
    i, f, o = "a_i_wide", "a_f_wide", "a_o_wide"
    if variant.peephole:
        i, f, o = "p_i", "p_f", "p_o"
        before_c = """w_wide = Cast<to: int = 1>(w_c)
  w_i, w_f, w_o = Split<axis: int = 0, num_outputs: int = 3>(w_wide)
  w_i_c = Mul(w_i, c_wide)
  w_f_c = Mul(w_f, c_wide)
  p_i = Add(a_i_wide, w_i_c)
  p_f = Add(a_f_wide, w_f_c)"""
        after_c = """w_o_c = Mul(w_o, c_sum)
  p_o = Add(a_o_wide, w_o_c)"""
    return f"""
{_signature(CONV_LSTM, "map" if variant.peephole else "none")} {{
  {constants}
  W = Concat<axis: int = 1>(W_x, W_h)
  h_narrow = CastLike(h, x)
  c_wide = Cast<to: int = 1>(c)
  xh = Concat<axis: int = 1>(x, h_narrow)
  a = {_CONV}(xh, W, b)
  a_i, a_f, a_o, a_g = Split<axis: int = 1, num_outputs: int = 4>(a)
  a_i_wide = Cast<to: int = 1>(a_i)
  a_f_wide = Cast<to: int = 1>(a_f)
  a_o_wide = Cast<to: int = 1>(a_o)
  a_g_wide = Cast<to: int = 1>(a_g)
  {before_c}
  i = {act["sigmoid"].format(i)}
  f = {act["sigmoid"].format(f)}
  g = {act["tanh"].format("a_g_wide")}
  f_c = Mul(f, c_wide)
  i_g = Mul(i, g)
  c_sum = Add(f_c, i_g)
  {after_c}
  o = {act["sigmoid"].format(o)}
  tanh_c = {act["tanh"].format("c_sum")}
  h_wide = Mul(o, tanh_c)
  h_next = CastLike(h_wide, h)
  c_next = CastLike(c_sum, c)
  y = CastLike(h_wide, x)
}}"""
