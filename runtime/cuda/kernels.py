"""CUDA kernels: compiled code loaded on the current device, and its launch."""

from __future__ import annotations

from typing import Any

from stepcell.runtime.cuda.bindings import check, driver

__all__ = ["Kernel"]

_DEFAULT_SHARED_BYTES = 48 * 1024  # of dynamic shared memory; a kernel that needs more has to ask for it


class Kernel:
    """A kernel loaded on the current device.

    A launch allocates nothing and waits for nothing, so it can be captured in a CUDA graph.

    Args:
        cubin: code for the compute capability of the device.
        entry: name of the kernel in it.
        threads: number of threads of a block.
        shared_bytes: dynamic shared memory of a block.
        device: number of the current device.
        overlaps: launch with programmatic stream serialization: a block may start before the kernel ahead of it in
            the stream is done, and waits for it by `griddepcontrol`.

    Raises:
        DeviceError: the driver refuses the code: it is for another GPU, or the driver is too old.
        MissingDependencyError: cuda-bindings is not installed.
    """

    def __init__(
        self, cubin: bytes, entry: str, *, threads: int, shared_bytes: int, device: int, overlaps: bool = False
    ) -> None:
        module = driver()
        self._threads, self._shared_bytes = threads, shared_bytes
        self._cubin = cubin  # the driver may read it for as long as the library is loaded
        self._library = check(module.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        kernel = check(module.cuLibraryGetKernel(self._library, entry.encode()))
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            limit = module.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(module.cuKernelSetAttribute(limit, shared_bytes, kernel, device))
        self._function = module.CUfunction(int(kernel))
        self._launch = module.cuLaunchKernelEx if overlaps else module.cuLaunchKernel
        self._config = _overlapping(module, threads, shared_bytes) if overlaps else None

    def launch(self, grid: tuple[int, int, int], stream: int, parameters: int) -> None:
        """Queue a launch.

        Args:
            grid: number of blocks along x, y and z.
            stream: handle of a CUDA stream.
            parameters: address of an array with the address of each kernel parameter.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        if self._config is None:
            result = self._launch(self._function, *grid, self._threads, 1, 1, self._shared_bytes, stream, parameters, 0)
        else:
            config = self._config
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.hStream = stream
            result = self._launch(config, self._function, parameters, 0)
        if result[0]:
            check(result)

    def close(self) -> None:
        """Unload the code. Launches that are queued must be done."""
        library, self._library = self._library, None
        if library is not None:
            check(driver().cuLibraryUnload(library))


def _overlapping(module: Any, threads: int, shared_bytes: int) -> Any:
    """A launch configuration with programmatic stream serialization, but for grid and stream."""
    attribute = module.CUlaunchAttribute()
    attribute.id = module.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = module.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = [attribute], 1
    return config
