"""Layers of a finished engine with the dtypes of their tensors, as TensorRT lists them.

TensorRT-RTX writes the list to its log while it builds, with no GPU; the engine inspector, which both flavours have,
needs the engine loaded on one. Both need an engine that was built with detailed profiling verbosity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import msgspec

__all__ = ["EngineLayer", "LayerTensor", "int8_convolutions", "layers_of_inspector", "layers_of_log"]

T = TypeVar("T")

_START = "Layers:"
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<rest>.*)$")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]|]*?)(?: \|[^\]]*)?\]")
_DTYPES = {
    "Half": "float16",
    "FP16": "float16",
    "Float": "float32",
    "FP32": "float32",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
    "Int32": "int32",
    "Int64": "int64",
    "Int8": "int8",
    "Bool": "bool",
    "UInt8": "uint8",
    "FP8": "float8",
}


class LayerTensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tensor that a layer reads or writes.

    Attributes:
        dtype: as the contract spells it; TensorRT's own name where the contract has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


class EngineLayer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One kernel of an engine.

    Attributes:
        kind: TensorRT's: "correlation" (a convolution), "kgen" (generated, pointwise), "gemm", ...
        nodes: names of the ONNX nodes it came from.
    """

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...] = ()
    constants: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    nodes: tuple[str, ...] = ()


def layers_of_log(message: str) -> tuple[EngineLayer, ...]:
    """The layers in a message of the builder's log; none, where it is another message."""
    if not message.startswith(_START):
        return ()
    found = []
    for line in message.splitlines():
        match = _LAYER.match(line)
        if match is None or match["kind"] in ("signal", "wait"):  # between streams; no kernels
            continue
        inputs, _, rest = match["rest"].partition("Constants: [")
        constants, _, rest = rest.partition("Outputs: [")
        outputs, _, metadata = rest.partition("TacticName:")
        found.append(
            EngineLayer(
                name=match["name"],
                kind=match["kind"],
                inputs=_tensors(inputs),
                constants=_tensors(constants),
                outputs=_tensors(outputs),
                nodes=_tuple(dict.fromkeys(_ORIGIN.findall(metadata))),
            )
        )
    return tuple(found)


def layers_of_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers in the JSON of `IEngineInspector.get_engine_information`; none, where it has names alone."""
    listed = json.loads(text).get("Layers", [])
    return tuple(
        EngineLayer(
            name=str(layer["Name"]),
            kind=str(layer.get("LayerType", "")),
            inputs=_tuple(_inspected(tensor) for tensor in layer.get("Inputs", [])),
            constants=_tuple(_inspected(tensor) for tensor in layer.get("Constants", [])),
            outputs=_tuple(_inspected(tensor) for tensor in layer.get("Outputs", [])),
            nodes=_tuple(dict.fromkeys(_ORIGIN.findall(str(layer.get("Metadata", ""))))),
        )
        for layer in listed
        if isinstance(layer, dict)
    )


def int8_convolutions(layers: Iterable[EngineLayer], names: Collection[str]) -> set[str]:
    """Those of the named Conv nodes whose kernel reads int8.

    A node may be in several layers: its weights may be rearranged in one, and what follows it computed in another.
    """
    return {
        name
        for layer in layers
        if "correlation" in layer.kind.lower() or "conv" in layer.kind.lower()
        if layer.inputs and layer.inputs[0].dtype == "int8"
        for name in layer.nodes
        if name in names
    }


def _tuple(items: Iterable[T]) -> tuple[T, ...]:
    """A tuple; an empty one is the default of its field itself, which msgspec recognises by identity and leaves out.

    Python 3.10 makes a new empty tuple of an empty generator.
    """
    return tuple(items) or ()


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return _tuple(
        LayerTensor(
            name=match["name"],
            dtype=_DTYPES.get(match["dtype"], match["dtype"].lower()),
            shape=_tuple(int(size) for size in match["shape"].split(",") if size.strip().lstrip("-").isdigit()),
        )
        for match in _TENSOR.finditer(text)
    )


def _inspected(tensor: dict[str, Any]) -> LayerTensor:
    # TensorRT 10 writes both into one text: "Format/Datatype": "Channel major FP16 format where C % 8 == 0"
    written = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    dtype = next((ours for theirs, ours in _DTYPES.items() if re.search(rf"\b{theirs}\b", written)), written.lower())
    shape = tensor.get("Dimensions") or []
    return LayerTensor(name=str(tensor.get("Name", "")), dtype=dtype, shape=_tuple(int(size) for size in shape))
