"""Kernels on a device: every cell of the report with every tile, a hundred steps, CUDA graphs, compute-sanitizer.

`make gpu-check` runs the tests that need a GPU. One test runs the same code on the CPU with few pixels, so mistakes in
the tests themselves show without a GPU. Cubins are taken from the folder STEPCELL_KERNELS; missing ones are compiled,
which needs Triton.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stepcell.errors import StepcellError
from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.launcher import Launcher
from stepcell.plugins.kernels.signature import PARAMETERS
from stepcell.plugins.kernels.store import images_for, wanted
from stepcell.plugins.kernels.tiles import Tile
from tools.kernel_steps import CELLS, TOLERANCE


class Device:
    """Launches compiled kernels on torch's CUDA memory and current stream."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.capability = f"{major}.{minor}"
        self.folder = Path(os.environ.get("STEPCELL_KERNELS", "build/kernels"))
        self._launchers: dict[tuple[str, str, str], Launcher] = {}

    def load(self, cell: CellConfig, pixels: int | None) -> None:
        """Every kernel of a cell with every tile."""
        for image in images_for(cell, self.capability, self.folder, pixels):
            self._launchers[image.info.kernel, cell.label, image.info.tile] = Launcher(image)

    def launch(
        self, kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: tuple[int, int, int]
    ) -> None:
        launcher, pixels = self._launchers[kernel, cell.label, tile.label], size[0] * size[1] * size[2]
        launcher.prepare(pixels)
        count = launcher.info.all_partial_bytes(pixels) // 4
        buffers = {**buffers, "partials": torch.full((count,), float("nan"), device="cuda")}
        addresses = [buffers[name].data_ptr() if name in buffers else 0 for name in launcher.buffers]
        launcher.launch(torch.cuda.current_stream().cuda_stream, addresses, *size)


@pytest.fixture(scope="module")
def device() -> Device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and a torch that was built for CUDA")
    found = Device()
    print(f"\n{torch.cuda.get_device_name()}, {found.capability}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    return found


def choices(cell: CellConfig, capability: str, pixels: int | None) -> list[dict[str, Tile]]:
    """Default tiles, then every other tile of every kernel in turn."""
    all_tiles = wanted(cell, capability, pixels)
    default = dict(reversed(all_tiles))
    return [default, *({**default, kernel: tile} for kernel, tile in all_tiles if tile != default[kernel])]


def check_tiles(
    steps: Callable[..., Any], cell: CellConfig, capability: str, pixels: int | None, count: int, **where: Any
) -> None:
    """Every choice of tiles against float64, outputs poisoned and guarded (conftest.py)."""
    for tile in choices(cell, capability, pixels):
        worst = steps(cell, tile=tile, fp16_mirror=False, **where).run(count)
        names = ", ".join(f"{kernel} {t.label}" for kernel, t in tile.items())
        print(f"{cell.label}: {names}: {worst}")
        assert max(worst.values()) <= TOLERANCE[cell.state_dtype], f"{cell.label}: {names}: worst {worst}"


@pytest.mark.parametrize(("cell", "pixels"), [pytest.param(c, p, id=c.label) for c, p in CELLS])
def test_a_hundred_steps_on_the_device(cell: CellConfig, pixels: int | None, steps: Any, device: Device) -> None:
    device.load(cell, pixels)
    check_tiles(
        steps, cell, device.capability, pixels, 100, size=(2, 45, 61), device="cuda", launch=device.launch
    )  # 5490 pixels: no tile divides them


@pytest.mark.parametrize("label", ["lstm-map_x3_h5_k3x3_soft_float16_pre", "gru-after_x3_h70_k3x3_hard_float16"])
def test_the_same_code_on_the_cpu(label: str, steps: Any) -> None:
    check_tiles(steps, CellConfig.from_label(label), "8.7", 300, 2, size=(1, 2, 3))


@pytest.mark.parametrize("label", ["gru_x3_h5_k3x3_soft_float32", "gru_x40_h40_k5x5_hard_float32_pre"])
def test_a_captured_step_equals_an_eager_one(label: str, steps: Any, device: Device) -> None:
    cell = CellConfig.from_label(label)
    device.load(cell, 300)
    graphs: list[torch.cuda.CUDAGraph] = []

    def launch(kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: Any) -> None:
        device.launch(kernel, cell, tile, buffers, size)
        outputs = {p.buffer: buffers[p.buffer] for p in PARAMETERS[kernel] if p.name.endswith("_out")}
        eager = {name: tensor.clone() for name, tensor in outputs.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            device.launch(kernel, cell, tile, buffers, size)
        for tensor in outputs.values():
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for name, tensor in outputs.items():
            assert torch.equal(tensor, eager[name]), f"{kernel}: {name} differs after a graph replay"
        graphs.append(graph)

    last = dict(wanted(cell, device.capability, 300))  # the split tiles, where there are any
    steps(cell, size=(1, 9, 11), tile=last, fp16_mirror=False, device="cuda", launch=launch).run(3)
    assert len(graphs) == 9


def test_the_sanitizer_finds_nothing(device: Device) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("needs compute-sanitizer")
    test = f"{__file__}::test_a_captured_step_equals_an_eager_one"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", test]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:]


def test_another_gpus_code_is_refused(device: Device, tmp_path: Path) -> None:
    other = "8.0" if device.capability != "8.0" else "9.0"
    cell = CellConfig.from_label("gru_x3_h5_k3x3_soft_float32")
    with pytest.raises(StepcellError, match="CUDA"):
        Launcher(next(images_for(cell, other, tmp_path)))
