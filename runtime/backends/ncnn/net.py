"""An ncnn network in memory, and one step of it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import DeviceError, StepcellError
from stepcell.optional_imports import require
from stepcell.runtime.backends.ncnn.graph import Network

__all__ = ["Net", "load_ncnn"]

_PLAIN, _AS_COMPUTED = 0, 1  # layouts in which ncnn returns a matrix
_OUT_OF_MEMORY = -100
_SPINS = "GOMP_SPINCOUNT"
_SPIN_COUNT = "1000"  # some 25 to 50 us
_OPTIONS = {
    # Float32 throughout: by default ncnn computes in float16 where the processor can.
    "use_fp16_packed": False,
    "use_fp16_storage": False,
    "use_fp16_arithmetic": False,
    "use_bf16_packed": False,
    "use_bf16_storage": False,
    "use_int8_inference": False,
    "use_vulkan_compute": False,
    # Winograd's F(6, 3) has twice the rounding error of F(4, 3), and is not faster (docs/performance.md).
    "use_winograd63_convolution": False,
}


def load_ncnn() -> Any:
    """The package, whose threads soon sleep while they wait for each other.

    By default they spin for milliseconds, with some 50 waits a step: where other programs, or decoders and encoders of
    this one, want the cores too, a step of 2 ms then takes up to 0.7 s. Sleeping at once doubles the time of a step of
    1.5 ms on free cores, and a wait of 1,000 turns before it costs nothing on busy ones (docs/performance.md). The
    count is read when the package's copy of the OpenMP library is loaded; what the user has set is kept.

    Raises:
        MissingDependencyError: it is not installed, or does not load.
    """
    ours = "ncnn" not in sys.modules and not any(name in os.environ for name in (_SPINS, "OMP_WAIT_POLICY"))
    if ours:
        os.environ[_SPINS] = _SPIN_COUNT
    try:
        return require("ncnn", extra="ncnn", purpose="running a model in ncnn")
    finally:
        if ours:
            del os.environ[_SPINS]


class Net:
    """A loaded network.

    Args:
        network: converted.
        threads: number of threads of a step; None: one per core.

    Raises:
        StepcellError: ncnn does not load it.
    """

    def __init__(self, network: Network, threads: int | None) -> None:
        self._ncnn = load_ncnn()
        self._network = network
        self._net: Any = self._ncnn.Net()
        for name, value in _OPTIONS.items():
            setattr(self._net.opt, name, value)
        if threads is not None:
            self._net.opt.num_threads = threads
        with tempfile.TemporaryDirectory(prefix="stepcell-") as folder:
            weights = Path(folder) / "weights.bin"  # in Python, ncnn reads binary weights from a file only
            weights.write_bytes(network.weights)
            if self._net.load_param_mem(network.param) or self._net.load_model(str(weights)):
                raise StepcellError("ncnn does not load the converted model")

    def matrix(self, name: str) -> tuple[Any, NDArray[np.float32]]:
        """A new matrix for an input, and a view of it.

        Its memory is ncnn's: a matrix over the memory of a numpy array crashes layers that work in place.
        """
        matrix = self._ncnn.Mat(tuple(reversed(self._network.shapes[name])))
        return matrix, np.array(matrix, copy=False)

    def values(self, matrix: Any) -> NDArray[np.float32]:
        """A view of a matrix, or a copy if it is not in a plain layout."""
        if matrix.elempack != 1:
            packed, matrix = matrix, self._ncnn.Mat()
            self._ncnn.convert_packing(packed, matrix, 1)
        return np.array(matrix, copy=False)

    def step(self, inputs: Mapping[str, Any], outputs: Iterable[str], states: Sequence[str]) -> dict[str, Any]:
        """One step.

        Args:
            inputs: matrix of every graph input.
            outputs: graph outputs to be returned in a plain layout.
            states: graph outputs to be returned as they were computed, which the next step reads without conversion.

        Returns:
            Matrices by name.

        Raises:
            DeviceError: not enough memory.
            StepcellError: a layer failed.
        """
        extractor = self._net.create_extractor()
        for name, blob in self._network.inputs.items():
            extractor.input(blob, inputs[name])
        found = {}
        for names, layout in ((outputs, _PLAIN), (states, _AS_COMPUTED)):
            for name in names:
                found[name] = matrix = self._ncnn.Mat()
                result = extractor.extract(self._network.outputs[name], matrix, layout)
                if result == _OUT_OF_MEMORY:
                    raise DeviceError("not enough memory", hint="use smaller frames, fewer streams or a smaller model")
                if result or matrix.empty():
                    raise StepcellError(f"ncnn returned {result}")
        return found
