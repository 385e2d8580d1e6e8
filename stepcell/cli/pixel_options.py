"""Options with which `export`, `fuse`, `run` and `verify` declare what the values of pictures are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
import msgspec

from stepcell.errors import UsageError
from stepcell.nv12 import CodedRange, Matrix, Nv12
from stepcell.pixels import ALL, ChannelOrder, PixelDType, Pixels

__all__ = ["pixel_dtype_option", "pixel_options", "pop_pixel_dtype", "pop_pixels"]

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--range", "pixel_range", multiple=True, metavar="[NAME:]LOW,HIGH",
        help="Values of a black and a white pixel, such as 0,1; without NAME for every picture.",
    ),
    click.option(
        "--mean", multiple=True, metavar="[NAME:]M,...",
        help="Mean per channel, subtracted after scaling to --range, in its units.",
    ),
    click.option("--std", multiple=True, metavar="[NAME:]S,...", help="Standard deviation per channel."),
    click.option("--channels", multiple=True, metavar="[NAME:]RGB|BGR", help="Order of three channels."),
    click.option("--layout", multiple=True, metavar="[NAME:]NCHW|NHWC", help="Axes of pictures."),
)  # fmt: skip


def pixel_options(command: _F) -> _F:
    """Add --range, --mean, --std, --channels and --layout to a command; `pop_pixels` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_DTYPE_OPTIONS = (
    click.option(
        "--pixels", "pixel_dtype", type=click.Choice(["float", "uint8", "nv12"]), default="float", show_default=True,
        help="Pictures of the file: values as the model computes; or bytes, converted in its graph, which take frames "
        "as RGB (batch, height, width, channels) or as NV12 (batch, height * 3 / 2, width).",
    ),
    click.option(
        "--matrix", type=click.Choice(get_args(Matrix)), help="Of the frames of --pixels nv12, which do not show it.",
    ),
    click.option(
        "--coded-range", type=click.Choice(get_args(CodedRange)),
        help="Of the frames of --pixels nv12: luma 16 to 235, or 0 to 255.",
    ),
)  # fmt: skip


def pixel_dtype_option(command: _F) -> _F:
    """Add --pixels, --matrix and --coded-range to a command; `pop_pixel_dtype` reads them."""
    for option in reversed(_DTYPE_OPTIONS):
        command = option(command)
    return command


def pop_pixel_dtype(options: dict[str, Any]) -> PixelDType:
    """Take the three options out of the arguments of a command.

    Raises:
        UsageError: NV12 without its matrix or its range, or one of them without NV12.
    """
    kind, matrix, coded = (options.pop(name) for name in ("pixel_dtype", "matrix", "coded_range"))
    if kind != "nv12":
        if matrix is not None or coded is not None:
            raise UsageError(f"--{'matrix' if matrix else 'coded-range'}: is for --pixels nv12, got --pixels {kind}")
        return "uint8" if kind == "uint8" else "float"
    if matrix is None or coded is None:
        missing = " and ".join(
            name for name, value in (("--matrix", matrix), ("--coded-range", coded)) if value is None
        )
        example = f"--pixels nv12 --matrix {matrix or 'bt709'} --coded-range {coded or 'limited'}"
        raise UsageError(
            f"--pixels nv12: needs {missing}: the bytes do not show how they become RGB, and it is not guessed",
            hint=f"such as {example} (most video of HD size; bt601 for SD and many webcams); ffprobe says what a clip "
            "declares as color_space and color_range",
        )
    return Nv12(matrix=matrix, range=coded)


def pop_pixels(options: dict[str, Any]) -> dict[str, Pixels]:
    """Take the five options out of the arguments of a command, as a declaration.

    Raises:
        UsageError: a malformed value, or one that is given twice.
    """
    found: dict[str, Pixels] = {}
    texts = {name: options.pop("pixel_range" if name == "range" else name) for name in Pixels.__struct_fields__}
    for option, values in texts.items():
        for text in values:
            name, _, value = str(text).rpartition(":")
            before = found.get(name or ALL, Pixels())
            if getattr(before, option) is not None:
                raise UsageError(f"--{option} {text}: given twice for {name or 'every picture'}")
            found[name or ALL] = msgspec.structs.replace(before, **{option: _value(option, value, text)})
    return found


def _value(option: str, value: str, text: str) -> Any:
    if option == "channels":
        if value.upper() not in get_args(ChannelOrder):
            raise UsageError(f"--channels: expected RGB or BGR, got {text!r}")
        return value.upper()
    if option == "layout":
        if not value.isalpha():
            raise UsageError(f"--layout: expected letters for the axes, got {text!r}", hint="such as NCHW or NHWC")
        return value.upper()
    numbers = _numbers(value)
    if numbers is None or (option == "range" and len(numbers) != 2):
        expected = "[NAME:]LOW,HIGH" if option == "range" else "[NAME:] and a number per channel, with commas between"
        example = {"range": "0,1", "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}[option]
        raise UsageError(f"--{option}: expected {expected}, got {text!r}", hint=f"such as --{option} {example}")
    return numbers


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return None
