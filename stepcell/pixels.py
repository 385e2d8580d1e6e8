"""Pixels: what the values of a picture are to a model, and how a user declares it.

A pixel p of 0 to 255 becomes `v = low + p / 255 * (high - low)`, and then `(v - mean) / std` of its channel: mean and
std are in the units of the range, in the order of the tensor's channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from stepcell.dims import Dim, symbols_of
from stepcell.errors import UsageError
from stepcell.nv12 import Nv12

if TYPE_CHECKING:
    from stepcell.contract import StepContract, TensorSpec

__all__ = [
    "ALL",
    "ChannelOrder",
    "Declaration",
    "PixelConversion",
    "PixelDType",
    "Pixels",
    "as_chw",
    "changes",
    "completed",
    "declare",
    "gain_and_offset",
    "is_frame_of_bytes",
    "is_quantity",
    "map_layout",
    "natural_layout",
    "picture_channels",
    "pixel_fault",
    "value_range",
]

ChannelOrder = Literal["RGB", "BGR"]
PixelDType = Literal["float", "uint8"] | Nv12  # of pictures: as the model computes, or converted in its graph
ALL = "*"  # key of a declaration for every picture
_PICTURE_LAYOUTS = ("NCHW", "NHWC", "CHW", "HWC", "NHW", "HW")
_CHANNELS = (1, 3, 4)
_BYTES = (0.0, 255.0)


class Pixels(msgspec.Struct, frozen=True, kw_only=True):
    """Declares what the values of a picture are; None leaves what the contract says.

    Attributes:
        range: values that a pixel of 0 and one of 255 have in the model, such as (0, 1).
        mean: subtracted per channel after that, in units of the range; one number for all channels, or one for each.
        std: divided by per channel after that.
        channels: order of three channels.
        layout: the axes, such as "NCHW" or "NHWC".
    """

    range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: ChannelOrder | None = None
    layout: str | None = None


class PixelConversion(msgspec.Struct, frozen=True, kw_only=True):
    """What bytes at an input or output of the graph are inside it: the graph converts them.

    Attributes:
        dtype, layout, range, mean, std, channels: of the tensor inside, as in a `TensorSpec`.
        pad_multiple: height and width of the frame are padded up to a multiple of it, by repeating the edge.
        nv12: of an input of NV12, how it becomes RGB; unset: the bytes are RGB or grey.
    """

    dtype: str
    layout: str
    range: tuple[float, float]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: ChannelOrder | None = None
    pad_multiple: int = 1
    nv12: Nv12 | msgspec.UnsetType = msgspec.UNSET


Declaration = Pixels | Mapping[str, Pixels]  # for every picture, or by name of an input or output and `ALL`


def picture_channels(spec: TensorSpec) -> int | None:
    """Channels of a picture, or of a batch of pictures: 1, 3 or 4; None: the tensor is none, or is made of events."""
    if spec.layout not in _PICTURE_LAYOUTS or len(spec.layout) != len(spec.shape) or spec.events:
        return None
    size = spec.shape[spec.layout.index("C")] if "C" in spec.layout else 1
    return size if isinstance(size, int) and size in _CHANNELS else None


def natural_layout(shape: Sequence[int | str | None]) -> str | None:
    """Layout of a tensor of four axes: NHWC if only the last one can be channels of a picture, else NCHW; else None."""
    if len(shape) != 4:
        return None
    return "NHWC" if shape[3] in _CHANNELS and shape[1] not in _CHANNELS else "NCHW"


def map_layout(shape: Sequence[Dim], inputs: Sequence[TensorSpec]) -> str | None:
    """NHW for three axes of which the last two follow height and width of a picture, as those of a label map do."""
    for spec in inputs:
        if len(shape) != 3 or spec.layout is None or picture_channels(spec) is None:
            continue
        sizes = [(dim, spec.shape[spec.layout.index(letter)]) for dim, letter in zip(shape[1:], "HW", strict=True)]
        if all(isinstance(dim, int) and isinstance(size, int) for dim, size in sizes):
            (height, whole_height), (width, whole_width) = sizes
            if height * whole_width == width * whole_height:  # type: ignore[operator]
                return "NHW"
        elif all(isinstance(dim, str) and symbols_of([dim]) == symbols_of([size]) for dim, size in sizes):
            return "NHW"
    return None


def value_range(spec: TensorSpec) -> tuple[float, float] | None:
    """Values of a black and a white pixel before mean and std; None: undefined.

    Bytes are the pixels themselves, and booleans are 0 and 1, unless the contract says something else.
    """
    implied = {"uint8": _BYTES, "bool": (0.0, 1.0)}
    return spec.range if spec.range is not None else implied.get(spec.dtype)


def is_frame_of_bytes(spec: TensorSpec) -> bool:
    """Whether a tensor is a frame as it is decoded, or a batch of them: (N, H, W, C) uint8, RGB or grey, not padded."""
    axes = spec.layout in ("NHWC", "HWC", "NHW", "HW")
    return (
        axes
        and spec.dtype == "uint8"
        and value_range(spec) == _BYTES
        and spec.channels != "BGR"
        and spec.pad_multiple == 1
    )


def is_quantity(spec: TensorSpec) -> bool:
    """Whether integers measure something, as bytes of a picture do, so that a difference of one is rounding.

    Integers of 8 and 16 bits and those with a declared range do; int32 and int64 are labels, indices and counts.
    """
    return spec.dtype in ("uint8", "int8", "uint16", "int16") or (spec.dtype[:3] == "int" and spec.range is not None)


def gain_and_offset(spec: TensorSpec, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset (C, 1, 1) of value = pixel * gain + offset, in the order of the tensor's channels.

    Raises:
        UsageError: the range is undefined.
    """
    limits = value_range(spec)
    if limits is None:
        raise UsageError(
            f"{spec.name}: the range of its pixel values is undefined", hint="declare it: --range LOW,HIGH"
        )
    low, high = limits
    mean = np.broadcast_to(spec.mean or 0.0, channels).reshape(-1, 1, 1)
    std = np.broadcast_to(spec.std or 1.0, channels).reshape(-1, 1, 1)
    return (high - low) / 255 / std, (low - mean) / std


_A = TypeVar("_A", bound=np.generic)


def as_chw(array: NDArray[_A], layout: str) -> NDArray[_A]:
    """A view (C, H, W) of a picture, of the first one of a batch."""
    view = array.transpose([layout.index(letter) for letter in "NCHW" if letter in layout])
    view = view[0] if "N" in layout else view
    return view if "C" in layout else view[None]


def completed(spec: TensorSpec) -> TensorSpec:
    """With what follows from the rest written out: the range of bytes, and RGB where three channels have a range."""
    channels = picture_channels(spec)
    if channels is None:
        return spec
    if spec.range is None and spec.dtype == "uint8":
        spec = msgspec.structs.replace(spec, range=_BYTES)
    if channels == 3 and spec.channels is None and spec.range is not None:
        spec = msgspec.structs.replace(spec, channels="RGB")
    return spec


def pixel_fault(spec: TensorSpec) -> str | None:
    """What is wrong with layout, range, mean, std or channel order of a tensor; None: nothing."""
    axes = spec.layout
    if axes is not None:
        letters = axes.isascii() and axes.isalpha() and axes.isupper() and len(set(axes)) == len(axes)
        if not letters or len(axes) != len(spec.shape):
            return f"layout: expected a letter for each axis of {spec.shape}, as in NCHW, got {axes!r}"
    channels = picture_channels(spec)
    if spec.range is not None:
        low, high = spec.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return f"range: expected low,high with low < high, got {low:g},{high:g}"
        smallest, largest = _limits(spec.dtype)
        if low < smallest or high > largest:
            return f"range {low:g},{high:g}: {spec.dtype} holds {smallest:g} to {largest:g}"
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values is None:
            continue
        if channels is None:
            return f"{name}: is for a picture, this one is {spec.layout or 'no layout'} {spec.shape}"
        if len(values) not in (1, channels):
            return f"{name}: expected {channels} numbers, one per channel, or one for all, got {len(values)}"
        if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            return (
                f"{name}: expected {'numbers above zero' if name == 'std' else 'finite numbers'}, got {_text(values)}"
            )
        if not spec.dtype.startswith("float"):
            return f"{name}: is for floats, this one is {spec.dtype}"
        limits = value_range(spec)
        if limits is None:
            return f"{name}: is in units of the range, which is undefined"
        if name == "mean" and not all(limits[0] <= value <= limits[1] for value in values):
            return f"mean {_text(values)} lies outside the range {limits[0]:g} to {limits[1]:g}, in whose units it is"
    if spec.channels is not None and channels != 3:
        return f"channels {spec.channels}: is an order of three channels, this one is {spec.layout} {spec.shape}"
    return None


def declare(contract: StepContract, given: Declaration | None) -> StepContract:
    """The contract with what a user says of its pictures.

    Without a name, a layout holds for every input and output of as many axes; a range for every picture but those of
    bytes, booleans and labels; mean and std for every picture that is an input; an order for every
    picture of three channels.

    Raises:
        UsageError: a name that the model does not have, nothing to which an option applies, or a value that does not
            fit.
    """
    if not given:
        return contract
    by_name = {ALL: given} if isinstance(given, Pixels) else dict(given)
    everyone = by_name.pop(ALL, Pixels())
    names = [spec.name for spec in (*contract.inputs, *contract.outputs)]
    if unknown := [name for name in by_name if name not in names]:
        raise UsageError(
            f"{unknown[0]}: the model has no input or output of this name", hint=f"it has {', '.join(names)}"
        )
    used: set[str] = set()

    def declared(spec: TensorSpec, *, is_input: bool) -> TensorSpec:
        own = by_name.get(spec.name, Pixels())
        if spec.events and own != Pixels():
            raise UsageError(f"{spec.name}: is made of events, not of pixels: their encoding is in the contract")
        layout = everyone.layout and len(everyone.layout) == len(spec.shape) and not spec.events
        found = {"layout": everyone.layout} if layout else {}
        channels = picture_channels(_replaced(spec, {**found, **_given(own, "layout")}))
        if channels is not None:
            labels = channels == 1 and not spec.dtype.startswith("float")
            found |= _given(everyone, "range") if spec.dtype not in ("uint8", "bool") and not labels else {}
            found |= _given(everyone, "mean", "std") if is_input else {}
            found |= _given(everyone, "channels") if channels == 3 else {}
        used.update(found)
        found |= _given(own, *Pixels.__struct_fields__)
        if not found:
            return spec
        replaced = completed(_replaced(spec, found))
        if fault := pixel_fault(replaced):
            raise UsageError(f"{spec.name}: {fault}", hint=_HINT)
        return replaced

    result: StepContract = msgspec.structs.replace(
        contract,
        inputs=tuple(declared(spec, is_input=True) for spec in contract.inputs),
        outputs=tuple(declared(spec, is_input=False) for spec in contract.outputs),
    )
    if idle := [option for option in _given(everyone, *Pixels.__struct_fields__) if option not in used]:
        message, hint = _inapplicable(idle[0], contract)
        raise UsageError(message, hint=hint or f"name the tensor: --{idle[0]} {names[0]}:...")
    return result


def changes(before: StepContract, after: StepContract) -> list[str]:
    """What a declaration changed, a line for each tensor: "x: range undefined -> 0 to 1"."""
    lines = []
    for old, new in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True):
        parts = [
            f"{name} {_shown(name, was)} -> {_shown(name, now)}"
            for name in ("layout", *Pixels.__struct_fields__[:4])
            if (was := getattr(old, name)) != (now := getattr(new, name))
        ]
        lines += [f"{new.name}: {', '.join(parts)}"] if parts else []
    return lines


_HINT = (
    "value = (LOW + pixel / 255 * (HIGH - LOW) - mean) / std, such as --range 0,1 --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225"
)


def _inapplicable(option: str, contract: StepContract) -> tuple[str, str | None]:
    """Message and hint for an option that applies to nothing."""
    if option == "layout":
        return "--layout: no input or output has as many axes", None
    pictures = [spec for spec in (*contract.inputs, *contract.outputs) if picture_channels(spec) is not None]
    if option == "channels" and pictures:
        return f"--channels: is an order of three channels, and {pictures[0].name} is {pictures[0].shape}", "omit it"
    if option == "range" and pictures:
        return f"--range: {pictures[0].name} takes {pictures[0].dtype}, which are pixels as they are", "omit it"
    tensors = ", ".join(f"{spec.name} {spec.shape}" for spec in (*contract.inputs, *contract.outputs))
    what = "no picture is an input" if option in ("mean", "std") else "nothing is a picture"
    return f"--{option}: {what} (1, 3 or 4 channels and a layout such as NCHW): {tensors}", None


def _given(pixels: Pixels, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(pixels, name)) is not None}


def _replaced(spec: TensorSpec, fields: Mapping[str, Any]) -> TensorSpec:
    result: TensorSpec = msgspec.structs.replace(spec, **fields)
    return result


def _limits(dtype: str) -> tuple[float, float]:
    if dtype == "bool":
        return 0.0, 1.0
    info = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    return float(info.min), float(info.max)


def _shown(name: str, value: object) -> str:
    if value is None:
        return "undefined" if name == "range" else "none"
    text = _text(value) if isinstance(value, tuple) else str(value)
    return text.replace(",", " to ") if name == "range" else text


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
