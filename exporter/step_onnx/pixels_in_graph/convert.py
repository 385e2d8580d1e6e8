"""Conversion of pixels inside the graph: pictures go in as bytes, uint8 NHWC or NV12, and come out as uint8 NHWC."""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Mapping, Sequence

import msgspec
import onnx

from stepcell.contract import StepContract, TensorSpec
from stepcell.dims import Dim, symbols_of
from stepcell.errors import ExportError, UsageError
from stepcell.exporter.step_onnx.pixels_in_graph.nodes import Frame, PixelNodes, bytes_layout
from stepcell.nv12 import Nv12, nv12_of, rows_of
from stepcell.pixels import PixelConversion, PixelDType, completed, picture_channels

__all__ = ["inputs_to_convert", "pixels_in_graph"]

logger = logging.getLogger(__name__)

_OPSET = 11  # the first with Clip, Pad and Round of floats as they are used here
_OPSET_NV12 = 13  # and with the sizes of Split, and the axes of Squeeze, as inputs


def pixels_in_graph(
    model: onnx.ModelProto, contract: StepContract, pixel_dtype: PixelDType = "uint8"
) -> tuple[onnx.ModelProto, StepContract]:
    """A copy of a file whose pictures are uint8 NHWC, or whose colour inputs are NV12, and its contract.

    Every input of floats that is a picture is converted, and every output of floats that is one and has a range. With
    each output comes the mean of its values, `NAME.mean` (batch,), in float32: it is NaN or Inf where the picture
    holds one, which bytes cannot show. A dynamic height and width become those of the frame, of any size, where the
    model needs a multiple.

    Args:
        model: a file with weights in memory; it is not changed.
        contract: its contract. The contract in the metadata of the result is still the old one.
        pixel_dtype: "uint8", or how inputs of three channels are made of NV12.

    Raises:
        UsageError: no picture is an input, one is made of bytes already, or its range is undefined.
        ExportError: an opset or sizes with which the conversion cannot be written.
    """
    inputs, option = inputs_to_convert(contract, pixel_dtype), _option(pixel_dtype)
    nv12 = pixel_dtype if isinstance(pixel_dtype, Nv12) else None
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    if opset < (needed := _OPSET if nv12 is None else _OPSET_NV12):
        raise ExportError(
            f"{option}: needs opset {needed}, the file has {opset}",
            hint="convert it first: onnx.version_converter.convert_version(model, 17)",
        )
    multiples = _multiples(contract, inputs, option)
    padded = {symbol: f"({symbol} + {by - 1}) // {by} * {by}" for symbol, by in multiples.items()}
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = PixelNodes(changed.graph, opset)
    frames: dict[str, Frame] = {}  # by padded symbol, the sizes of the input that has it
    new_inputs = {}
    for spec in inputs:
        by = [
            multiples.get(str(dim), 1) if letter in "HW" else 1
            for letter, dim in zip(str(spec.layout), spec.shape, strict=True)
        ]
        how = nv12 if picture_channels(spec) == 3 else None
        frame = nodes.convert_input(spec, by, how)
        if frame is not None:
            frames |= {str(dim): frame for dim, each in zip(spec.shape, by, strict=True) if each > 1}
        as_bytes = _as_bytes(spec, spec.shape, math.lcm(*by))
        new_inputs[spec.name] = as_bytes if how is None else _as_nv12(as_bytes, how, option)
        if frame is None and spec.pad_multiple > 1:
            logger.info(f"pixels:  {spec.name}: frames of exactly {_size(spec)}: the sizes are fixed, none is padded")

    outputs: list[TensorSpec] = []
    means: list[TensorSpec] = []
    for spec in contract.outputs:
        found, frame = _padded(spec, padded), _frame_of(spec, frames)
        picture = picture_channels(spec) is not None
        shape = _cropped(spec, frame, padded) if picture and frame is not None else found.shape
        if picture and spec.dtype.startswith("float") and spec.range is not None:
            outputs.append(_as_bytes(spec, shape, 1))
            means.append(nodes.convert_output(spec, frame))
        else:
            if picture and spec.dtype.startswith("float"):
                logger.warning(
                    f"{spec.name}: stays {spec.dtype}, its range is undefined; if it is a picture: "
                    f"--range {spec.name}:LOW,HIGH"
                )
            if picture and frame is not None:
                nodes.crop_output(spec, frame)
            outputs.append(msgspec.structs.replace(found, shape=tuple(shape)))
    even = symbols_of(dim for spec in new_inputs.values() if nv12_of(spec) for dim in spec.shape[-2:])
    result = msgspec.structs.replace(
        contract,
        example={name: size + (name in even and size % 2) for name, size in contract.example.items()},
        inputs=tuple(new_inputs.get(spec.name) or _padded(spec, padded) for spec in contract.inputs),
        outputs=(*outputs, *means),
        states=tuple(
            msgspec.structs.replace(state, shape=tuple(_in_padded(dim, padded) for dim in state.shape))
            for state in contract.states
        ),
    )
    result.check(option)
    nodes.finish(result)
    return changed, result


def inputs_to_convert(contract: StepContract, pixel_dtype: PixelDType = "uint8") -> list[TensorSpec]:
    """The inputs of floats that are pictures.

    Raises:
        UsageError: there is none, one is made of bytes already, its range is undefined, or NV12 is for a model of
            grey pictures.
    """
    option = _option(pixel_dtype)
    frames = [spec for spec in contract.inputs if not spec.value]
    pictures = [spec for spec in frames if picture_channels(spec) is not None]
    floats = [spec for spec in pictures if spec.dtype.startswith("float")]
    if floats:
        for spec in floats:
            if spec.range is None:
                others = (each.range for each in (*contract.inputs, *contract.outputs))
                name = f"{spec.name}:" if any(others) else ""
                raise UsageError(
                    f"{option}: the range of {spec.name} is undefined, and it is not guessed",
                    hint=f"declare what a black and a white pixel are to the model, such as {option} --range {name}0,1",
                )
        if isinstance(pixel_dtype, Nv12) and all(picture_channels(spec) != 3 for spec in floats):
            raise UsageError(
                f"{option}: NV12 is of three channels, and {floats[0].name} is {floats[0].shape}",
                hint="--pixels uint8 takes grey frames",
            )
        return floats
    if events := [spec for spec in frames if spec.events]:
        raise UsageError(f"{option}: {events[0].name} is made of events, not of pixels", hint="omit it")
    if converted := [*pictures, *(spec for spec in frames if nv12_of(spec))]:
        kind = "NV12" if nv12_of(converted[0]) else converted[0].dtype
        raise UsageError(f"{option}: {converted[0].name} is {kind} already", hint="omit it")
    names = ", ".join(f"{spec.name} {spec.shape} {spec.layout or 'without a layout'}" for spec in contract.inputs)
    raise UsageError(
        f"{option}: no input is a picture (1, 3 or 4 channels and a layout such as NCHW): {names or 'none'}",
        hint="declare the axes, such as --layout NHWC, or omit it",
    )


def _option(pixel_dtype: PixelDType) -> str:
    if not isinstance(pixel_dtype, Nv12):
        return f"--pixels {pixel_dtype}"
    return f"--pixels nv12 --matrix {pixel_dtype.matrix} --coded-range {pixel_dtype.range}"


def _multiples(contract: StepContract, inputs: Sequence[TensorSpec], option: str) -> dict[str, int]:
    """By symbol of a height or width, the multiple to pad to, where it is above 1."""
    found: dict[str, int] = {}
    for spec in contract.inputs:
        for letter, dim in zip(spec.layout or "", spec.shape, strict=False):
            if letter in "HW" and isinstance(dim, str) and spec.pad_multiple > 1:
                if not dim.isidentifier():
                    raise ExportError(
                        f"{option}: {spec.name}: a size of {dim!r} cannot be padded to a multiple of "
                        f"{spec.pad_multiple} in the graph",
                        hint="fix the sizes: --shape",
                    )
                found[dim] = math.lcm(found.get(dim, 1), spec.pad_multiple)
    own = symbols_of(dim for spec in inputs for dim in spec.shape if str(dim).isidentifier())
    return {symbol: by for symbol, by in found.items() if symbol in own}


def _as_bytes(spec: TensorSpec, shape: Sequence[Dim], multiple: int) -> TensorSpec:
    """The spec of the bytes; `shape` in the order of the layout that the model has."""
    before = str(spec.layout)
    after = bytes_layout(before)
    axis = spec.batch_axis
    return completed(
        TensorSpec(
            name=spec.name,
            shape=tuple(shape[before.index(letter)] for letter in after),
            dtype="uint8",
            layout=after,
            batch_axis=after.index(before[axis]) if isinstance(axis, int) else axis,
            converts=PixelConversion(
                dtype=spec.dtype,
                layout=before,
                range=spec.range or (0.0, 1.0),
                mean=spec.mean,
                std=spec.std,
                channels=spec.channels,
                pad_multiple=multiple,
            ),
        )
    )


def _as_nv12(spec: TensorSpec, how: Nv12, option: str) -> TensorSpec:
    """The spec of the frames in NV12, of that of their bytes as pixels."""
    layout, conversion = str(spec.layout), spec.converts
    assert isinstance(conversion, PixelConversion)
    height, width = (spec.shape[layout.index(letter)] for letter in "HW")
    for size in (height, width):
        if size % 2 if isinstance(size, int) else not size.isidentifier():
            raise ExportError(
                f"{option}: {spec.name}: the frames are {width}x{height}, and NV12 has an even height and width",
                hint="fix even sizes, such as --shape x:1x3x256x256, or use --pixels uint8",
            )
    return TensorSpec(
        name=spec.name,
        shape=(*spec.shape[: layout.index("H")], rows_of(height), width),
        dtype="uint8",
        range=spec.range,
        batch_axis=spec.batch_axis,
        converts=msgspec.structs.replace(conversion, nv12=how),
    )


def _size(spec: TensorSpec) -> str:
    height, width = (spec.shape[str(spec.layout).index(letter)] for letter in "HW")
    return f"{width}x{height}"


def _padded(spec: TensorSpec, padded: Mapping[str, str]) -> TensorSpec:
    replaced: TensorSpec = msgspec.structs.replace(spec, shape=tuple(_in_padded(dim, padded) for dim in spec.shape))
    return replaced


def _in_padded(dim: Dim, padded: Mapping[str, str]) -> Dim:
    """A size with the padded size in place of each symbol."""
    if not isinstance(dim, str) or not set(symbols_of([dim])) & padded.keys():
        return dim

    class Replaced(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(padded[node.id], mode="eval").body if node.id in padded else node

    return ast.unparse(Replaced().visit(ast.parse(dim, mode="eval")))


def _cropped(spec: TensorSpec, frame: Frame, padded: Mapping[str, str]) -> tuple[Dim, ...]:
    """Shape of an output without the padding: ceil(size * frame / padded frame), as the nodes of `crop` compute it."""

    def cropped(letter: str, dim: Dim) -> Dim:
        if letter not in "HW" or not isinstance(dim, str):
            return dim
        size = str(frame.spec.shape[str(frame.spec.layout).index(letter)])
        if size not in padded or size not in symbols_of([dim]):
            return _in_padded(dim, padded)
        if dim.replace(" ", "") == size or _times(dim, size):
            return dim
        whole = padded[size]
        return f"(({_in_padded(dim, padded)}) * {size} + {whole} - 1) // ({whole})"

    return tuple(cropped(letter, dim) for letter, dim in zip(str(spec.layout), spec.shape, strict=True))


def _times(dim: str, symbol: str) -> bool:
    """Whether a size is a symbol times a number."""
    left, _, right = dim.replace(" ", "").partition("*")
    return (left == symbol and right.isdecimal()) or (right == symbol and left.isdecimal())


def _frame_of(spec: TensorSpec, frames: Mapping[str, Frame]) -> Frame | None:
    return next((frames[symbol] for symbol in symbols_of(spec.shape) if symbol in frames), None)
