"""Store of compiled kernels: a folder of images that the compiler fills on demand.

A machine without Triton, such as a Jetson, uses a folder that was filled on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import MissingDependencyError, OutputError, PluginError
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import cell_word, check_capability, compile_kernel, source_digest
from stepcell.plugins.kernels.image import KernelImage, is_outdated, read_image, write_image
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.kernels.tiles import Tile, tiles

__all__ = ["default_folder", "image_for", "images_for", "wanted"]


def default_folder() -> Path:
    """$XDG_CACHE_HOME/stepcell/kernels, or ~/.cache/stepcell/kernels."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "stepcell" / "kernels"


def wanted(cell: CellConfig, capability: str, pixels: int | None = None) -> list[tuple[str, Tile]]:
    """(kernel, tile) pairs that a build uses: kernels in launch order, the default tile of each first."""
    check_capability(capability)
    return [
        (kernel, tile)
        for kernel in kernels_of(cell, fp16_mirror=False)
        for tile in tiles(kernel, cell, capability, pixels)
    ]


def images_for(cell: CellConfig, capability: str, folder: Path, pixels: int | None = None) -> Iterator[KernelImage]:
    """Yield the images of `wanted`, in order, compiling those that the folder lacks.

    Each compilation takes about a second.

    Args:
        pixels: expected batch * height * width; None: unknown.

    Raises:
        UsageError: the kernels are not compiled for this compute capability.
        PluginError, InputError, BuildError, OutputError: as `image_for`.
    """
    return (image_for(kernel, cell, tile, capability, folder) for kernel, tile in wanted(cell, capability, pixels))


def image_for(kernel: str, cell: CellConfig, tile: Tile, capability: str, folder: Path) -> KernelImage:
    """One kernel with one tile, from the folder, or compiled and added to it.

    Raises:
        PluginError: it is not in the folder and Triton is not installed.
        InputError: a file in the folder is damaged.
        BuildError: Triton or its assembler failed.
        OutputError: the folder cannot be written.
    """
    paths = sorted(folder.glob(f"{kernel}-sm{capability.replace('.', '')}-*.json"))
    found = (read_image(path) for path in paths if not is_outdated(path))
    name = (source_digest(), cell_word(kernel, cell), tile.label)
    image = next((i for i in found if (i.info.source, i.info.cell, i.info.tile) == name), None)
    return image or _compiled_into(folder, kernel, cell, tile, capability)


def _compiled_into(folder: Path, kernel: str, cell: CellConfig, tile: Tile, capability: str) -> KernelImage:
    try:
        image = compile_kernel(kernel, cell, tile, capability)
    except MissingDependencyError as error:
        raise PluginError(
            f"kernels for {capability}: {kernel} of {cell.label} is not in {folder}, and Triton, which compiles it, "
            "is not installed",
            hint=f"on any machine with stepcell[kernels]: stepcell kernels compile --compute-capability {capability} "
            f"--cell {cell.label} -o kernels; then copy the folder here",
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})", hint="choose another folder") from error
    write_image(image, folder)
    return image
