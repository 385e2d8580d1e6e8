"""Small step models with a contract, written as ONNX text."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.parser

from stepcell.contract import METADATA_KEY, StateSpec, StepContract, TensorSpec

__all__ = ["slow_memory", "step_model"]


def step_model(
    text: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], states: Sequence[StateSpec]
) -> onnx.ModelProto:
    """A model of opset 20 from the text of its graph, where a state is called "state_in.h" and "state_out.h"."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    contract = StepContract(inputs=tuple(inputs), outputs=tuple(outputs), states=tuple(states), precision="float16")
    model.metadata_props.add(key=METADATA_KEY, value=contract.to_json())
    return model


_TYPES: dict[str, tuple[str, int]] = {"float16": ("float16", 10), "float32": ("float", 1)}


def slow_memory(computed: str = "float16", stored: str = "float32") -> onnx.ModelProto:
    """h <- h + 0.001 (1 - h), which tends to 1; y = h.

    Args:
        computed: the type to which h is cast before the update, and in which that is computed.
        stored: the type of the state.
    """
    (_, wide), (kind, narrow) = _TYPES[computed], _TYPES[stored]
    text = f"""
    memory (float16[1, 4] x, {kind}[1, 4] "state_in.h") => (float16[1, 4] y, {kind}[1, 4] "state_out.h") {{
      one_32 = Constant<value = float[1] {{1.0}}>()
      rate_32 = Constant<value = float[1] {{0.001}}>()
      one = Cast<to = {wide}>(one_32)
      rate = Cast<to = {wide}>(rate_32)
      h = Cast<to = {wide}>("state_in.h")
      rest = Sub(one, h)
      change = Mul(rate, rest)
      moved = Add(h, change)
      "state_out.h" = Cast<to = {narrow}>(moved)
      y_h = Cast<to = 10>(moved)
      y = Add(x, y_h)
    }}"""
    sizes = (1, 4)
    return step_model(
        text,
        [TensorSpec(name="x", shape=sizes, dtype="float16")],
        [TensorSpec(name="y", shape=sizes, dtype="float16")],
        [StateSpec(name="h", shape=sizes, dtype=stored)],  # type: ignore[arg-type]
    )
