"""Serialised form of a plugin node in a TensorRT plan: the cell and its compiled kernels as one field of bytes.

    SHA-256 of the rest | MessagePack of `_Fields`

The kernels' machine code is included, so a device that runs the plan needs neither Triton nor a compiler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stepcell.errors import EngineMismatchError, UsageError
from stepcell.plugins.kernels import image
from stepcell.plugins.kernels.cell_config import WORDS, CellConfig
from stepcell.plugins.kernels.compile import arguments_of, cell_word
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.signature import PARAMETERS, kernels_of
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of

__all__ = ["PLUGIN_VERSION", "PluginIdentity", "interface_digest", "pack_fields", "plugin_identity", "read_fields"]

PLUGIN_VERSION = "2"  # in TensorRT's registry; increment when the node's tensors change
_SCHEMA = 2  # of the bytes; increment when a field changes its meaning
_DIGEST = 32


class _Fields(msgspec.Struct, frozen=True):
    schema: int
    cell: str
    fp16_mirror: bool
    images: tuple[KernelImage, ...]


class _Head(msgspec.Struct):
    schema: int


@dataclass(frozen=True)
class PluginIdentity:
    """The plugin that an engine needs.

    Attributes:
        version: in TensorRT's registry.
        sha256: `interface_digest` of the stepcell that built the engine.
    """

    version: str
    sha256: str


def plugin_identity() -> PluginIdentity:
    """The plugin of this stepcell."""
    return PluginIdentity(PLUGIN_VERSION, interface_digest())


def interface_digest() -> str:
    """SHA-256 of everything that a plan and the plugin that runs it must agree on.

    It does not depend on comments or on how kernels are launched, so such changes keep old plans valid.
    """
    samples = [
        CellConfig.from_label(f"{word}_x8_h8_k3x3_soft_{state}")
        for word in WORDS.values()
        for state in ("float32", "float16")
    ]
    agreed = (
        (PLUGIN_VERSION, _SCHEMA, image.SCHEMA),
        [(kernel, arguments_of(kernel)) for kernel in sorted(PARAMETERS)],
        [
            (
                cell.label,
                given,
                inputs_of(cell, fp16_mirror=given),
                outputs_of(cell),
                kernels_of(cell, fp16_mirror=given),
            )
            for cell in samples
            for given in (False, True)
        ],
    )
    return hashlib.sha256(repr(agreed).encode()).hexdigest()


def pack_fields(cell: CellConfig, images: Sequence[KernelImage], *, fp16_mirror: bool) -> bytes:
    """Serialise a node.

    Args:
        images: every kernel of the cell, with one or more tiles, for one compute capability.
        fp16_mirror: as in `inputs_of`.
    """
    body = msgspec.msgpack.encode(_Fields(_SCHEMA, cell.label, fp16_mirror, tuple(images)))
    return hashlib.sha256(body).digest() + body


def read_fields(data: bytes) -> tuple[CellConfig, tuple[KernelImage, ...], bool]:
    """Deserialise a node: the cell, its kernels, and whether the node has the fp16 mirror as input.

    Raises:
        EngineMismatchError: the bytes are damaged, or from a stepcell version with another interface.
    """
    body = data[_DIGEST:]
    if hashlib.sha256(body).digest() != data[:_DIGEST]:
        raise _unusable(f"damaged: {len(data)} bytes that do not fit their checksum")
    try:
        schema = msgspec.msgpack.decode(body, type=_Head).schema
        if schema != _SCHEMA:
            raise _unusable(f"of schema {schema}, this stepcell reads {_SCHEMA}")
        fields = msgspec.msgpack.decode(body, type=_Fields)
        cell = CellConfig.from_label(fields.cell)
    except (msgspec.MsgspecError, UsageError) as error:
        raise _unusable(f"not readable: {error}") from error
    for kernel in kernels_of(cell, fp16_mirror=fields.fp16_mirror):
        if not any(each.info.kernel == kernel for each in fields.images):
            raise _unusable(f"incomplete: {cell.label} needs {kernel}")
    for each in fields.images:
        _check_image(cell, each)
    return cell, fields.images, fields.fp16_mirror


def _check_image(cell: CellConfig, kernel: KernelImage) -> None:
    info = kernel.info
    if info.schema != image.SCHEMA or info.kernel not in PARAMETERS or info.arguments != arguments_of(info.kernel):
        raise _unusable(f"of another interface: kernel {info.kernel} takes other arguments than this stepcell gives")
    if info.cell != cell_word(info.kernel, cell):
        raise _unusable(f"mixed up: kernel {info.kernel} of {info.cell} in a plan for {cell.label}")
    if hashlib.sha256(kernel.cubin).hexdigest() != info.sha256:
        raise _unusable(f"damaged: the code of {info.kernel} does not fit its checksum")


def _unusable(what: str) -> EngineMismatchError:
    return EngineMismatchError(
        f"the plugin's part of the engine is {what}", hint="build the engine again with `stepcell build`"
    )
