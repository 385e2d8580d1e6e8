"""Kernel image: a compiled kernel and everything needed to launch it, in memory and on disk.

A folder of images holds two files per kernel: KEY.cubin, readable by NVIDIA's tools, and KEY.json. Both are
written atomically, so several builds may share a folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec

from stepcell.errors import InputError
from stepcell.files import read_bytes, write_atomic
from stepcell.json_text import decode_json
from stepcell.seal import ZEROS, check_seal, sealed

__all__ = ["Argument", "ImageInfo", "KernelImage", "is_outdated", "read_image", "write_image"]

_AGAIN = "delete both files of the kernel; the next build compiles it again if Triton is installed"
SCHEMA = 2  # raise it when a field changes its meaning; 2: checksum
_FIELD = b'"checksum": "'
Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


class Argument(msgspec.Struct, frozen=True):
    """One parameter in a kernel's argument block.

    Attributes:
        name: in the kernel; "scratch0" and "scratch1" are added by Triton and always null.
        buffer: name of the memory passed (signature.py), or H, W or P; empty for memory of the launcher and
            for the scratch pointers.
        offset: bytes from the start of the block.
        size: 8 for a pointer, 4 for an int32.
    """

    name: str
    buffer: str
    offset: Size
    size: Count


class ImageInfo(msgspec.Struct, frozen=True):
    """Contents of KEY.json.

    Attributes:
        schema: schema version of this structure.
        key: hash of everything that changes the code.
        source: `source_digest` it was compiled from; an image with another digest is not used.
        kernel: such as "gru_gates".
        cell: label of the cell (cell_config.py); for narrow_state, which depends on less, "h" and the channels.
        tile: label of the tile (tiles.py).
        capability: the only compute capability it runs on, such as "8.7".
        entry: the function's name in the cubin.
        warps: a program has 32 times as many threads.
        shared_bytes: dynamic shared memory of a program.
        registers: per thread.
        tensor_core_instructions: matrix instructions in the code.
        spill_instructions: stack reads and writes in the code; 0 in a good kernel.
        grid_pixels: a launch has ceil(P / grid_pixels) by grid_channels by splits programs.
        grid_channels: see grid_pixels.
        max_pixels: largest number of pixels per launch; offsets are int32.
        arguments: in the order of the kernel's parameters.
        sha256: of the cubin.
        triton: version that compiled it.
        splits: programs that share the K loop of a tile (triton/split.py).
        partial_bytes: partial sums per program; 0: the tile is not split.
        overlaps: launched before its predecessor has finished, and waits for it itself.
        checksum: SHA-256 of KEY.json with zeros in place of this field.
    """

    schema: int
    key: str
    source: str
    kernel: str
    cell: str
    tile: str
    capability: str
    entry: str
    warps: Count
    shared_bytes: Size
    registers: Size
    tensor_core_instructions: Size
    spill_instructions: Size
    grid_pixels: Count
    grid_channels: Count
    max_pixels: Count
    arguments: tuple[Argument, ...]
    sha256: str
    triton: str
    splits: Count = 1
    partial_bytes: Size = 0
    overlaps: bool = False
    checksum: str = ZEROS

    def tiles(self, pixels: int) -> int:
        """Number of tiles of a launch over `pixels` = batch * height * width: programs / splits."""
        return -(-pixels // self.grid_pixels) * self.grid_channels

    def all_partial_bytes(self, pixels: int) -> int:
        """Bytes of the partial sums of one launch; 0: the tile is not split."""
        return self.partial_bytes * self.splits * self.tiles(pixels)


class KernelImage(msgspec.Struct, frozen=True):
    """A compiled kernel with its description. Serialised as MessagePack in a plan, cubin included."""

    info: ImageInfo
    cubin: bytes


def write_image(image: KernelImage, folder: Path) -> Path:
    """Write both files; returns the path of the cubin.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    path = folder / f"{image.info.key}.cubin"
    write_atomic(path, image.cubin)
    info = msgspec.structs.replace(image.info, checksum=ZEROS)
    text = msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n"
    write_atomic(path.with_suffix(".json"), sealed(text, _FIELD))
    return path


def is_outdated(path: Path) -> bool:
    """Whether KEY.json was written by an older version, which is no damage: such an image is compiled again."""
    try:
        return msgspec.json.decode(read_bytes(path), type=_Head).schema < SCHEMA
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


class _Head(msgspec.Struct):
    schema: int


def read_image(path: Path) -> KernelImage:
    """Read KEY.json and the cubin beside it.

    Raises:
        InputError: a file cannot be read or parsed, its checksum does not match, or the cubin does not match its
            description.
    """
    data = read_bytes(path)
    info = decode_json(data, ImageInfo, str(path), what="is no kernel description", hint=_AGAIN)
    if info.schema != SCHEMA:
        raise InputError(f"{path}: has schema {info.schema}, expected {SCHEMA}", hint=_AGAIN)
    if check_seal(data, _FIELD, info.checksum):
        raise InputError(f"{path}: is damaged: it does not match its checksum", hint=_AGAIN)
    cubin = read_bytes(path.with_suffix(".cubin"))
    if hashlib.sha256(cubin).hexdigest() != info.sha256:
        raise InputError(
            f"{path.with_suffix('.cubin')}: is not the code that {path.name} describes",
            hint=_AGAIN,
        )
    return KernelImage(info, cubin)
