"""The step by the fused kernels, launched without TensorRT, and the time of each kernel with each tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Problem, States, Step, Weights, in_turn
from kernel_timing import CHAIN, captured, microseconds
from torch import Tensor

from stepcell.errors import StepcellError
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.launcher import Launcher
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.signature import kernels_of
from stepcell.plugins.kernels.store import image_for
from stepcell.plugins.kernels.tiles import COLUMNS, Tile, tiles

__all__ = ["Device", "Launch", "defaults", "fastest", "ours", "overlapping", "tile_times"]

# (kernel, cell, tile, memory by buffer name, (batch, height, width))
Launch = Callable[[str, CellConfig, Tile, Mapping[str, Tensor], tuple[int, int, int]], None]


class Device:
    """Launches kernels on torch's current stream; loads and, if necessary, compiles them first.

    Args:
        capability: compute capability of the current device, such as "9.0".
        folder: folder of compiled kernels.
    """

    def __init__(self, capability: str, folder: Path) -> None:
        self.capability = capability
        self._folder = folder
        self._launchers: dict[tuple[str, CellConfig, Tile], Launcher] = {}
        self._partials: dict[int, Tensor] = {}

    def launch(
        self, kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, Tensor], size: tuple[int, int, int]
    ) -> None:
        """Queue one kernel; the first call must not happen during a graph capture."""
        key = (kernel, cell, tile)
        if key not in self._launchers:
            self._launchers[key] = Launcher(image_for(kernel, cell, tile, self.capability, self._folder))
        launcher, pixels = self._launchers[key], size[0] * size[1] * size[2]
        launcher.prepare(pixels)
        if count := launcher.info.all_partial_bytes(pixels) // 4:
            if count not in self._partials:
                self._partials[count] = torch.empty(count, device="cuda")
            buffers = {**buffers, "partials": self._partials[count]}
        addresses = [buffers[name].data_ptr() if name in buffers else 0 for name in launcher.buffers]
        launcher.launch(torch.cuda.current_stream().cuda_stream, addresses, *size)


def ours(problem: Problem, state: Any, chosen: Sequence[Mapping[str, Tile]], launch: Launch) -> tuple[Step, States]:
    """The step and its initial states: those of the op, then the fp16 mirror of a float32 h.

    A loop keeps the mirror (it is y of the last step), so no kernel has to convert the state.

    Args:
        state: "float16" or "float32".
        chosen: the tile of every kernel, for each cell.
    """
    case = problem.case
    steps = [
        _cell_step(cell.with_state(state), weights, tile, launch, (case.batch, case.height, case.width))
        for cell, weights, tile in zip(case.cells, problem.weights, chosen, strict=True)
    ]
    if state == "float16":
        return in_turn(steps), problem.states
    wide = (each.float().contiguous() for each in problem.states)
    return in_turn(steps), (*wide, problem.states[0])


def _cell_step(
    cell: CellConfig, weights: Weights, chosen: Mapping[str, Tile], launch: Launch, size: tuple[int, int, int]
) -> Step:
    arrays = pack(cell, {name: tensor.cpu().numpy() for name, tensor in weights.items()})
    packed = {name: torch.from_numpy(array).to(weights["b"].device) for name, array in arrays.items()}

    def step(x: Tensor, states: States) -> States:
        buffers = {**packed, **_step_buffers(cell, x, states)}
        for kernel in kernels_of(cell, fp16_mirror=True):
            launch(kernel, cell, chosen[kernel], buffers, size)
        new = [buffers[name] for name in ("state_out", "cell_out") if name in buffers]
        return (*new, buffers["y"]) if cell.state_dtype == "float32" else tuple(new)

    return step


def _step_buffers(cell: CellConfig, x: Tensor, states: States) -> dict[str, Tensor]:
    """Memory of a step without the weights.

    Channels-last maps have the layout of the kernels if the channels are a multiple of 8, as they are here.
    """
    wide = cell.state_dtype == "float32"
    h = states[-1] if wide else states[0]
    y, z, rh = (torch.empty_like(h) for _ in range(3))
    buffers = {"x": x, "h": h, "z": z, "rh": rh, "y": y}
    buffers |= {"state": states[0], "state_out": torch.empty_like(states[0]) if wide else y}
    if cell.op == "ConvLSTM":
        buffers |= {"cell": states[1], "cell_out": torch.empty_like(states[1])}
    return buffers


def _tiles_to_time(kernel: str, cell: CellConfig, capability: str, pixels: int, *, tune: bool) -> list[Tile]:
    """Tiles of the table, the default first; with `tune` also all others that are worth trying.

    A candidate that starts early is not timed separately: after another candidate it would overlap with that one and
    look faster than after the gates. It is timed as a contender of whole steps.
    """
    offered = [t for t in tiles(kernel, cell, capability, pixels) if not (t.overlap and kernel == "gru_candidate")]
    if tune:
        for rows, columns, depth, stages in itertools.product((64, 128), (32, 64, 128), (32, 64), (2, 3, 4)):
            offered.append(Tile(rows, max(columns // COLUMNS[kernel], 16), depth, stages))
        offered += [replace(offered[0], splits=splits) for splits in (2, 4, 8)]
    return list(dict.fromkeys(offered))


def defaults(problem: Problem, state: Any, capability: str) -> list[dict[str, Tile]]:
    """The table's first tile of every kernel, for each cell."""
    cells = [cell.with_state(state) for cell in problem.case.cells]
    return [
        {
            kernel: tiles(kernel, cell, capability, problem.case.pixels)[0]
            for kernel in kernels_of(cell, fp16_mirror=True)
        }
        for cell in cells
    ]


def launch_time(run: Callable[[], None]) -> dict[str, float]:
    """Microseconds per launch of many consecutive launches in one graph."""
    run()  # compiled and loaded before the capture

    def many() -> None:
        for _ in range(CHAIN):
            run()

    whole = microseconds(captured(many).replay)
    return {name: value / CHAIN for name, value in whole.items()}


def tile_times(
    problem: Problem,
    state: Any,
    capability: str,
    launch: Launch,
    *,
    tune: bool = False,
    clock: Callable[[Callable[[], None]], dict[str, float]] = launch_time,
) -> list[dict[str, Any]]:
    """Microseconds of every kernel of a step with every tile, timed separately; input for correcting tiles.py."""
    rows = []
    calls: list[tuple[Any, ...]] = []

    def record(
        kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, Tensor], size: tuple[int, int, int]
    ) -> None:
        calls.append((kernel, cell, tile, buffers, size))
        launch(kernel, cell, tile, buffers, size)

    step, states = ours(problem, state, defaults(problem, state, capability), record)
    step(problem.xs[0], states)
    for kernel, cell, default, buffers, size in calls:
        for tile in _tiles_to_time(kernel, cell, capability, problem.case.pixels, tune=tune):
            row = {"kernel": kernel, "cell": cell.label, "pixels": problem.case.pixels, "tile": tile.label}
            row["default"] = tile == default
            try:
                row["microseconds"] = clock(partial(launch, kernel, cell, tile, buffers, size))
            except (StepcellError, RuntimeError) as error:  # a tile that does not fit this GPU
                row["not_run"] = str(error).splitlines()[0]
            rows.append(row)
    return rows


def overlapping(problem: Problem, state: Any, capability: str, chosen: Sequence[Mapping[str, Tile]]) -> Any:
    """`chosen` with candidates that start while the gates still run, if the table has such a tile."""
    result = []
    for cell, tiles_of_cell in zip(problem.case.cells, chosen, strict=True):
        early = dict(tiles_of_cell)
        if "gru_candidate" in early:
            tile = replace(early["gru_candidate"], overlap=True)
            if tile in tiles("gru_candidate", cell.with_state(state), capability, problem.case.pixels):
                early["gru_candidate"] = tile
        result.append(early)
    return result


def fastest(
    rows: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Tile]], cells: Sequence[CellConfig]
) -> Any:
    """`chosen` with the fastest tile (by median) of every kernel that was timed."""
    result = []
    for cell, tiles_of_cell in zip(cells, chosen, strict=True):
        best = dict(tiles_of_cell)
        for kernel in best:
            timed = [r for r in rows if (r["kernel"], r["cell"]) == (kernel, cell.label) and "microseconds" in r]
            if timed:
                best[kernel] = Tile.from_label(min(timed, key=lambda r: r["microseconds"]["median"])["tile"])
        result.append(best)
    return result
