"""One step of a cell on the device: its kernels, and the memory that each gets.

Per step only `CellStep.run` is called, which orders addresses and queues the kernels. Loading code and dividing the
scratch memory happen before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter

from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.image import KernelImage
from stepcell.plugins.kernels.launcher import Launcher
from stepcell.plugins.kernels.signature import kernels_of, workspace
from stepcell.plugins.tensorrt.tensors import inputs_of, outputs_of

__all__ = ["CellStep", "tactics", "workspace_size"]

_ALIGNMENT = 256  # of each scratch buffer, as cuMemAlloc has it


def tactics(
    cell: CellConfig, images: Sequence[KernelImage], *, fp16_mirror: bool
) -> tuple[tuple[KernelImage, ...], ...]:
    """All combinations of tiles for a step: one image per kernel, in launch order; the default tiles first.

    Args:
        fp16_mirror: as in `inputs_of`.
    """
    kernels = kernels_of(cell, fp16_mirror=fp16_mirror)
    return tuple(itertools.product(*([i for i in images if i.info.kernel == kernel] for kernel in kernels)))


def workspace_size(cell: CellConfig, images: Sequence[KernelImage], pixels: int, *, fp16_mirror: bool) -> int:
    """Bytes of scratch memory that suffice for a step over `pixels` = batch * height * width with any tactic."""
    return sum(map(_aligned, _scratch(cell, images, pixels, fp16_mirror).values()))


def _scratch(cell: CellConfig, images: Sequence[KernelImage], pixels: int, fp16_mirror: bool) -> dict[str, int]:
    """Bytes of each scratch buffer. Split kernels share the buffer of partial sums, since they run in sequence."""
    partials = max(image.info.all_partial_bytes(pixels) for image in images)
    return workspace(cell, pixels, fp16_mirror=fp16_mirror) | ({"partials": partials} if partials else {})


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class CellStep:
    """The kernels of one step, loaded on the current device. For one thread at a time.

    Args:
        cell: the cell.
        images: one per kernel, in launch order: an entry of `tactics`.
        device: CUDA number of the current device.
        fp16_mirror: as in `inputs_of`.

    Raises:
        DeviceError, MissingDependencyError: the code cannot be loaded.
    """

    def __init__(self, cell: CellConfig, images: Sequence[KernelImage], device: int, *, fp16_mirror: bool) -> None:
        self._cell, self._images, self._fp16_mirror = cell, images, fp16_mirror
        self._launchers = [Launcher(image, device) for image in images]
        # The addresses of a step are one row: null, inputs, outputs, scratch.
        scratch = list(_scratch(cell, images, 1, fp16_mirror))
        row = ["", *(t.buffer for t in (*inputs_of(cell, fp16_mirror=fp16_mirror), *outputs_of(cell))), *scratch]
        places = {name: place for place, name in enumerate(row)}
        if "h" not in places:
            places["h"] = places["state"]  # a float16 state needs no mirror
        # Pointers that this cell does not use are null.
        self._launches = [
            (each.launch, itemgetter(*(places.get(b, 0) for b in each.buffers))) for each in self._launchers
        ]
        self._sizes = (0, 0, 0)
        self._offsets: list[int] = []

    def resize(self, batch: int, height: int, width: int) -> None:
        """Set the sizes for the following steps."""
        self._sizes, pixels = (batch, height, width), batch * height * width
        for launcher in self._launchers:
            launcher.prepare(pixels)
        sizes = _scratch(self._cell, self._images, pixels, self._fp16_mirror).values()
        self._offsets = list(itertools.accumulate(map(_aligned, sizes), initial=0))[:-1]

    def run(self, inputs: Sequence[int], outputs: Sequence[int], scratch: int, stream: int) -> None:
        """Queue one step.

        Args:
            inputs, outputs: addresses in the order of tensors.py.
            scratch: address of `workspace_size` bytes.
            stream: the CUDA stream's handle.

        Raises:
            InputError: an address is not a multiple of 16, or the map is too large.
            DeviceError: the driver refuses a launch.
        """
        row = (0, *inputs, *outputs, *[scratch + offset for offset in self._offsets])
        for launch, pick in self._launches:
            launch(stream, pick(row), *self._sizes)

    def close(self) -> None:
        """Unload the code. All queued steps must have finished."""
        for launcher in self._launchers:
            launcher.close()
