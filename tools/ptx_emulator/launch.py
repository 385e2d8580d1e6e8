"""Compile a kernel and launch it in the emulator through the project's own launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.compile import compile_kernel, compile_ptx
from stepcell.plugins.kernels.launcher import Launcher
from stepcell.plugins.kernels.tiles import Tile
from tools.ptx_emulator.driver import EmulatedDriver
from tools.ptx_emulator.program import parse

__all__ = ["CAPABILITIES", "Edit", "Emulated"]

CAPABILITIES = ["8.7", "9.0", "11.0", "12.0"]  # each multiplies, loads or stores differently

Edit = Callable[[str], str]


class Emulated:
    """Launches kernels in the emulator, for tools.kernel_steps.Steps.

    Attributes:
        driver: replaces the CUDA driver.
        edit: changes the PTX of a kernel before it runs.
    """

    def __init__(self, capability: str, driver: EmulatedDriver) -> None:
        self.capability, self.driver = capability, driver
        self.edit: Edit | None = None
        self._launchers: dict[tuple[str, CellConfig, Tile], Launcher] = {}

    def launcher(self, kernel: str, cell: CellConfig, tile: Tile) -> Launcher:
        key = (kernel, cell, tile)
        if key not in self._launchers:
            image = compile_kernel(kernel, cell, tile, self.capability)
            text = compile_ptx(kernel, cell, tile, self.capability).text
            self.driver.learn(image, parse(self.edit(text) if self.edit else text))
            self._launchers[key] = Launcher(image)
        return self._launchers[key]

    def launch(
        self, kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: tuple[int, int, int]
    ) -> None:
        launcher, pixels = self.launcher(kernel, cell, tile), size[0] * size[1] * size[2]
        launcher.prepare(pixels)
        partials = torch.full((launcher.info.all_partial_bytes(pixels) // 4,), float("nan"))
        given = {**buffers, **({"partials": partials} if len(partials) else {})}
        addresses = [
            self.driver.know(name, given[name], shared=name == "partials") if name in given else 0
            for name in launcher.buffers
        ]
        launcher.launch(0, addresses, *size)
        self.driver.finish()
