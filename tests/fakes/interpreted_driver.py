"""Interpreted driver: a fake CUDA driver whose launches run in Triton's interpreter, at once.

A launch finds its arguments through the packed parameters, as on a GPU.
"""

# ruff: noqa: N802  # the names of CUDA

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.compile import arguments_of, cell_word
from stepcell.plugins.kernels.image import SCHEMA, ImageInfo, KernelImage
from stepcell.plugins.kernels.signature import PARAMETERS, constants, kernels_of, pointer_dtype
from stepcell.plugins.kernels.tiles import Tile, partial_bytes
from tests.fakes.interpreted_kernels import launch
from tools.fake_driver import OK, FakeDriver

TILES = (Tile(32, 16, 16, 1), Tile(128, 32, 64, 1), Tile(32, 32, 32, 1, splits=3))


def images_of(cell: CellConfig, tiles: Sequence[Tile] = TILES) -> tuple[KernelImage, ...]:
    """Every kernel of a cell with every tile, described as the compiler does; the code names kernel, tile and cell."""
    found = []
    for kernel in kernels_of(cell, fp16_mirror=False):
        for tile in [each for each in tiles if each.splits == 1 or kernel != "narrow_state"]:
            cubin = f"{kernel} {tile.label} {cell.label}".encode()
            info = ImageInfo(
                schema=SCHEMA,
                key=f"{kernel}-{tile.label}",
                source="",
                kernel=kernel,
                cell=cell_word(kernel, cell),
                tile=tile.label,
                capability="8.7",
                entry=f"entry of {kernel}",
                warps=tile.warps,
                shared_bytes=0,
                registers=0,
                tensor_core_instructions=0,
                spill_instructions=0,
                grid_pixels=tile.pixels,
                grid_channels=-(-padded(cell.hidden) // tile.channels),
                max_pixels=1 << 20,
                arguments=arguments_of(kernel),
                sha256=hashlib.sha256(cubin).hexdigest(),
                triton="",
                splits=tile.splits,
                partial_bytes=partial_bytes(kernel, tile),
            )
            found.append(KernelImage(info, cubin))
    return tuple(found)


class InterpretedDriver(FakeDriver):
    """A fake driver that runs the gate kernels.

    Attributes:
        loaded: contents of every library, or "unloaded".
        launches: kernel and tile of every launch.
        counters: memory that came from `cuMemAlloc`, by address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded, self.launches = list[str](), list[str]()
        self.counters = dict[int, torch.Tensor]()

    def buffer(self, nbytes: int) -> torch.Tensor:
        """New device memory as bytes; all ones, which is NaN in every float type."""
        return torch.frombuffer(self.allocations[self.allocate(max(nbytes, 1))], dtype=torch.uint8)[:nbytes]

    def cuLibraryLoadData(self, code: bytes, *rest: Any) -> Any:
        self.loaded.append(code.decode())
        return OK, len(self.loaded) - 1

    def cuLibraryGetKernel(self, library: int, name: bytes) -> Any:
        assert name.decode() == f"entry of {self.loaded[library].split()[0]}"
        return OK, library

    def cuLibraryUnload(self, library: int) -> Any:
        self.loaded[library] = "unloaded"
        return (OK,)

    def cuMemAlloc(self, nbytes: int) -> Any:
        status, address = super().cuMemAlloc(nbytes)
        if address:
            self.counters[address] = torch.frombuffer(self.allocations[address], dtype=torch.uint8)
        return status, address

    def cuMemFree(self, address: int) -> Any:
        del self.counters[address]
        return super().cuMemFree(address)

    def cuLaunchKernel(self, function: int, *rest: Any) -> Any:
        kernel, label, cell_label = self.loaded[function].split()
        cell, tile = CellConfig.from_label(cell_label), Tile.from_label(label)
        columns, rows, splits, threads, _, _, _, stream, parameters, _ = rest
        assert threads == 128
        assert stream
        count = len(PARAMETERS[kernel]) + 2
        places = (ctypes.c_void_p * count).from_address(parameters)
        arguments: list[Any] = []
        for place, parameter in zip(places, PARAMETERS[kernel], strict=False):
            assert place is not None
            if parameter.dtype == "int32":
                arguments.append(ctypes.c_int32.from_address(place).value)
            else:
                address = ctypes.c_uint64.from_address(place).value
                arguments.append(self._tensor(address, pointer_dtype(parameter, cell)))
        self.launches.append(f"{kernel} {label}")
        launch(kernel, (columns, rows, splits), arguments, constants(kernel, cell, tile))
        return (OK,)

    def _tensor(self, address: int, dtype: str) -> torch.Tensor:
        """The memory from an address to the end of its allocation; nothing may be read at 0."""
        if address == 0:
            return torch.zeros(8, dtype=torch.float16)
        dtype = "int32" if dtype == "count" else dtype
        for start, block in self.allocations.items():
            if 0 <= address - start < len(block):
                return torch.frombuffer(block, dtype=torch.uint8)[address - start :].view(getattr(torch, dtype))
        raise AssertionError(f"address {address:#x} lies in no allocation")


def to_map(x: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(x.shape[0], *x.shape[2:], padded(x.shape[1]), dtype=torch.float16)
    result[..., : x.shape[1]] = x.permute(0, 2, 3, 1)
    return result
