"""Emulated driver: a fake CUDA driver whose launches run in the emulator.

Code is recognised by its machine code, which is what a launcher loads; what runs is the PTX it was assembled from. A
launch that may overlap the one before it is run that way: its programs go as far as they can before that one has begun.
"""

# ruff: noqa: N802  # the names of CUDA

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepcell.plugins.kernels.image import KernelImage
from tools.fake_driver import OK, FakeDriver
from tools.ptx_emulator.cta import Code, Cta
from tools.ptx_emulator.memory import Memory
from tools.ptx_emulator.program import Fault, Program

__all__ = ["EmulatedDriver"]


@dataclass
class _Launch:
    """A launch that has not finished."""

    code: Code
    grid: tuple[int, int, int]
    shared_bytes: int
    arguments: bytes
    running: list[Iterator[str]]


class EmulatedDriver(FakeDriver):
    """A fake driver that runs PTX, and names the memory that launches may reach.

    Args:
        seed: seed of the random order in which the programs of a launch run.

    Attributes:
        overlapped: number of launches that started before the previous one had finished.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.memory = Memory()
        self._random = random.Random(seed)
        self._codes: dict[bytes, Code] = {}
        self._libraries: list[Code | None] = []
        self._waiting: _Launch | None = None
        self.overlapped = 0

    def learn(self, image: KernelImage, program: Program) -> None:
        """Register the program that the machine code of an image was assembled from."""
        if program.threads != 32 * image.info.warps:
            raise Fault(
                f"{image.info.key}: {program.threads} threads in the text, {image.info.warps} warps in the image"
            )
        self._codes[image.cubin] = Code(program)

    def load(self, program: Program) -> int:
        """Load a program; returns the number that a launch refers to it by."""
        self._libraries.append(Code(program))
        return len(self._libraries)

    def know(self, name: str, tensor: torch.Tensor, *, shared: bool = False) -> int:
        """Make the memory of a tensor accessible to launches; returns its address."""
        self.memory.add(name, tensor.data_ptr(), tensor.numel() * tensor.element_size(), shared=shared)
        return tensor.data_ptr()

    def cuLibraryLoadData(self, code: bytes, *rest: Any) -> Any:
        self._libraries.append(self._codes[code])
        return OK, len(self._libraries)

    def cuLibraryGetKernel(self, library: int, name: bytes) -> Any:
        return OK, library

    def cuLibraryUnload(self, library: int) -> Any:
        self.finish()
        self._libraries[library - 1] = None
        return (OK,)

    def cuKernelSetAttribute(self, *rest: Any) -> Any:
        return (OK,)

    def cuMemAlloc(self, nbytes: int) -> Any:
        status, address = super().cuMemAlloc(nbytes)
        self.memory.add("driver's memory", address, nbytes, shared=True)
        return status, address

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> Any:
        self.finish()
        return super().cuMemsetD8Async(address, value, nbytes, stream)

    def cuMemFree(self, address: int) -> Any:
        self.finish()
        return super().cuMemFree(address)

    def cuStreamSynchronize(self, stream: int) -> Any:
        self.finish()
        return super().cuStreamSynchronize(stream)

    def cuLaunchKernel(self, function: int, *rest: Any) -> Any:
        columns, rows, splits, threads, _, _, shared_bytes, _, parameters, _ = rest
        self.finish()
        self._waiting = self._made(function, (columns, rows, splits), threads, shared_bytes, parameters)
        return (OK,)

    def cuLaunchKernelEx(self, config: Any, function: int, parameters: int, extra: int) -> Any:
        (attribute,) = config.attrs
        assert attribute.id == self.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        launch = self._made(function, grid, config.blockDimX, config.sharedMemBytes, parameters)
        before = self._waiting
        # Only where the launch before lets others start early does this one do so.
        allowed = before is not None and any(
            i.opcode == ("griddepcontrol", "launch_dependents") for i in before.code.program.instructions
        )
        if not allowed:
            self.finish()
        self.overlapped += allowed
        self.memory.start_launch()
        with np.errstate(all="ignore"):
            begun = [(program, next(program, None)) for program in launch.running]
        launch.running = [program for program, word in begun if word is not None]
        if any(word not in ("wait", None) for _, word in begun):
            raise Fault("a launch that overlaps lets others start before it waits")
        self.finish()
        self._waiting = launch
        return (OK,)

    def finish(self) -> None:
        """Run the waiting launch to its end."""
        launch, self._waiting = self._waiting, None
        if launch is None:
            return
        self.memory.start_launch()
        with np.errstate(all="ignore"):  # threads that are masked compute too
            for program in launch.running:
                for _ in program:
                    pass

    def _made(self, function: int, grid: Any, threads: int, shared_bytes: int, parameters: int) -> _Launch:
        code = self._libraries[function - 1]
        if code is None or threads != code.program.threads:
            raise Fault(f"launch of {threads} threads, or of code that was unloaded")
        arguments = bytearray(max(offset + size for offset, size in code.program.parameters.values()))
        places = (ctypes.c_void_p * len(code.program.parameters)).from_address(parameters)
        for place, (offset, size) in zip(places, code.program.parameters.values(), strict=True):
            assert place is not None
            arguments[offset : offset + size] = ctypes.string_at(place, size)
        launch = _Launch(code, grid, shared_bytes, bytes(arguments), [])
        numbers = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        self._random.shuffle(numbers)
        launch.running = [
            Cta(code, self.memory, shared_bytes, 1 + i, (place, grid), launch.arguments).run()
            for i, place in enumerate(numbers)
        ]
        return launch
