"""A CUDA driver played by Triton's interpreter: a launch runs at once, on host memory, and finds everything through
the packed arguments, as a GPU does."""

from __future__ import annotations

import ctypes
import hashlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepcell.plugins.kernels.cell_config import CellConfig, padded
from stepcell.plugins.kernels.compile import arguments_of, cell_word
from stepcell.plugins.kernels.image import ImageInfo, KernelImage
from stepcell.plugins.kernels.signature import PARAMETERS, constants, kernels_of, pointer_dtype
from stepcell.plugins.kernels.tiles import Tile, partial_bytes
from tests.stand_ins.interpreted_kernels import interpreted

TILES = (Tile(32, 16, 16, 1), Tile(128, 32, 64, 1), Tile(32, 32, 32, 1, splits=3))


def images_of(cell: CellConfig, tiles: Sequence[Tile] = TILES) -> tuple[KernelImage, ...]:
    """Every kernel of a cell with every tile, as the compiler describes them; their code is their name and tile."""
    found = []
    for kernel in kernels_of(cell, fp16_mirror=False):
        for tile in [each for each in tiles if each.splits == 1 or kernel != "narrow_state"]:
            cubin = f"{kernel} {tile.label} {cell.label}".encode()
            info = ImageInfo(
                schema=1,
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


class Driver(types.ModuleType):
    """In the place of cuda.bindings.driver.

    Attributes:
        memory: buffers that kernels may use.
        blocks: more of them by address: those of a pretended CUDA runtime.
        launches: kernel and tile of every launch.
    """

    def __init__(self, blocks: Mapping[int, Any] | None = None) -> None:
        super().__init__("cuda.bindings.driver")
        self.memory, self.loaded, self.launches = list[torch.Tensor](), list[str](), list[str]()
        self.blocks = {} if blocks is None else blocks
        self.ok = types.SimpleNamespace(value=0)
        self.CUfunction = int
        self.counters = dict[int, torch.Tensor]()

    def cuCtxGetDevice(self) -> Any:  # noqa: N802
        return self.ok, 0

    def cuLibraryLoadData(self, code: bytes, *rest: Any) -> Any:  # noqa: N802
        self.loaded.append(code.decode())
        return self.ok, len(self.loaded) - 1

    def cuLibraryGetKernel(self, library: int, name: bytes) -> Any:  # noqa: N802
        assert name.decode() == f"entry of {self.loaded[library].split()[0]}"
        return self.ok, library

    def cuLibraryUnload(self, library: int) -> Any:  # noqa: N802
        self.loaded[library] = "unloaded"
        return (self.ok,)

    def cuMemAlloc(self, nbytes: int) -> Any:  # noqa: N802
        """Dirty memory: for counters, which must be set to zero."""
        memory = self.buffer(nbytes)
        self.counters[memory.data_ptr()] = memory.view(torch.int32)
        return self.ok, memory.data_ptr()

    def cuMemsetD32(self, address: int, value: int, count: int) -> Any:  # noqa: N802
        assert len(self.counters[address]) == count
        self.counters[address].fill_(value)
        return (self.ok,)

    def cuStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        return (self.ok,)

    def cuMemFree(self, address: int) -> Any:  # noqa: N802
        del self.counters[address]
        return (self.ok,)

    def cuLaunchKernel(self, function: int, *rest: Any) -> Any:  # noqa: N802
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
        interpreted(kernel)[columns, rows, splits](*arguments, **constants(kernel, cell, tile))
        return (self.ok,)

    def _tensor(self, address: int, dtype: str) -> torch.Tensor:
        """The memory from an address to the end of the buffer it lies in; nothing may be read at 0."""
        if address == 0:
            return torch.zeros(8, dtype=torch.float16)
        dtype = "int32" if dtype == "count" else dtype
        for owner in self.memory:
            offset = address - owner.data_ptr()
            if 0 <= offset < owner.numel():
                return owner[offset:].view(getattr(torch, dtype))
        for start, block in self.blocks.items():
            if 0 <= address - start < len(block):
                return torch.frombuffer(block, dtype=getattr(torch, dtype), offset=address - start)
        raise AssertionError(f"address {address:#x} lies in no buffer")

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Bytes at an address that is a multiple of 256, all ones: NaN in every float type."""
        whole = torch.full((nbytes + 256,), 255, dtype=torch.uint8)
        start = -whole.data_ptr() % 256
        self.memory.append(whole[start : start + nbytes])
        return self.memory[-1]


def to_map(x: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(x.shape[0], *x.shape[2:], padded(x.shape[1]), dtype=torch.float16)
    result[..., : x.shape[1]] = x.permute(0, 2, 3, 1)
    return result
