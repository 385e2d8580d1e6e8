"""ncnn or ONNX Runtime: a model is compared in both, and stepped in one of them.

A converted model is trusted only after it agreed with ONNX Runtime at the sizes of the run. The verdict is remembered
(`verdicts`); the converted model is not, since converting takes milliseconds.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stepcell import __version__
from stepcell.contract import StepContract
from stepcell.errors import StepcellError, UsageError
from stepcell.machine import cpu_name
from stepcell.runtime.backends.base import Backend, StepFuture
from stepcell.runtime.backends.ncnn import trial
from stepcell.runtime.backends.ncnn.backend import NcnnBackend
from stepcell.runtime.backends.ncnn.graph import Network, NotConvertible
from stepcell.runtime.backends.ncnn.verdicts import Key, Verdict, recall, remember
from stepcell.runtime.backends.onnxruntime.backend import OrtBackend
from stepcell.runtime.cuda import DeviceArray

__all__ = ["ChosenBackend"]

logger = logging.getLogger(__name__)

_SECONDS = 0.8  # of timing, which with the comparison before it takes about one second
_FASTER = 1.03  # times as fast as ONNX Runtime must ncnn be, so that noise does not decide


class ChosenBackend:
    """A `Backend` that steps a model in ncnn or in ONNX Runtime; the choice is made when the sizes are known.

    Args:
        path: of the file, for messages.
        source: the file in ONNX Runtime on the CPU.
        threads: number of threads for one step; None: one per core.
        only_ncnn: step it in ncnn, or raise an error that says why it cannot; False: in what is faster here.

    Raises:
        MissingDependencyError: ncnn is not installed.
    """

    overlaps = False

    def __init__(self, path: Path, source: OrtBackend, *, threads: int | None, only_ncnn: bool) -> None:
        self._path, self._threads, self._only_ncnn = path, threads, only_ncnn
        self._source = source
        self._ncnn = NcnnBackend(path, source, threads=threads)
        self._active: Backend = self._ncnn if only_ncnn else source
        self._known = only_ncnn  # whether it is chosen
        self.contract: StepContract = source.contract
        self.device = source.device

    @property
    def description(self) -> str:
        """That of the back end in use; before the first step, of both where the choice is open."""
        active = self._active.description
        return active if self._known else f"{active}, or {self._ncnn.description}, whichever is faster"

    @property
    def skips_idle(self) -> bool:
        """As the back end in use."""
        return self._active.skips_idle

    @property
    def input_stream(self) -> int | None:
        """None: inputs are on the host."""
        return None

    def configure(self, symbols: Mapping[str, int]) -> None:
        """Choose a back end for these sizes.

        Raises:
            UsageError: ncnn is asked for, and cannot compute this model.
            StepcellError: ncnn is asked for, and computes something else than ONNX Runtime.
        """
        refusal = self._refusal(symbols)
        if refusal is None:
            self._active = self._ncnn
            self._source.close()
        else:
            if self._only_ncnn:
                raise refusal
            logger.info(f"{self._path}: runs in ONNX Runtime: {refusal.message}")
            self._active = self._source
            self._source.configure(symbols)
            self._ncnn.release()
        self._active.reset()
        self._known = True

    def step(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> dict[str, NDArray[Any]]:
        return self._active.step(inputs, idle)

    def enqueue(
        self, inputs: Mapping[str, NDArray[Any] | DeviceArray], idle: Sequence[int] = ()
    ) -> StepFuture[dict[str, NDArray[Any]]]:
        """Run the whole step in this call."""
        return self._active.enqueue(inputs, idle)

    def step_on_device(self, inputs: Mapping[str, NDArray[Any] | DeviceArray]) -> dict[str, DeviceArray]:
        """Not supported: raises UsageError."""
        return self._active.step_on_device(inputs)

    def interrupt(self) -> None:
        """As the back end in use."""
        self._active.interrupt()

    def reset(self, rows: Sequence[bool] | None = None) -> None:
        self._active.reset(rows)

    def read_state(self) -> dict[str, NDArray[Any]]:
        return self._active.read_state()

    def write_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._active.write_state(state)

    def read_row(self, row: int) -> dict[str, NDArray[Any]]:
        return self._active.read_row(row)

    def write_row(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        self._active.write_row(row, state)

    def close(self) -> None:
        self._ncnn.release()
        self._source.close()

    def _refusal(self, symbols: Mapping[str, int]) -> StepcellError | None:
        """Why ncnn is not used for these sizes; None: it is, and is configured."""
        keep = "--backend onnxruntime, or leave it out"
        try:
            self._ncnn.configure(symbols)
        except NotConvertible as reason:
            return UsageError(f"ncnn cannot compute this model: {reason}", hint=keep)
        except StepcellError as error:
            return error
        assert self._ncnn.network is not None
        key = self._key(self._ncnn.network, symbols)
        verdict = recall(key)
        known = verdict is not None and (self._only_ncnn or verdict.speedup is not None)
        if verdict is None or not (known or verdict.difference > trial.TOLERANCE):
            verdict = self._trial(symbols)
            remember(key, verdict)
        if not verdict.difference <= trial.TOLERANCE:
            return StepcellError(
                f"in ncnn its results differ from ONNX Runtime's by {verdict.difference:.1e} of the largest value over "
                f"{trial.STEPS} steps, and {trial.TOLERANCE:g} is allowed",
                hint=keep,
            )
        if self._only_ncnn:
            return None
        speedup, when = verdict.speedup or math.nan, "as measured before" if known else "measured just now"
        told = f"ncnn takes {1 / speedup:.2f} of ONNX Runtime's time for a step of these sizes, {when}"
        if not speedup >= _FASTER:
            return StepcellError(told)
        logger.info(f"{self._path}: runs in ncnn: {told}")
        return None

    def _trial(self, symbols: Mapping[str, int]) -> Verdict:
        self._source.configure(symbols)
        difference = min(trial.difference(self._source, self._ncnn, symbols), 1e30)
        if self._only_ncnn or difference > trial.TOLERANCE:
            return Verdict(difference=difference)
        speedup = trial.speedup(self._source, self._ncnn, symbols, _SECONDS)
        return Verdict(difference=difference, speedup=round(speedup, 3))

    def _key(self, network: Network, symbols: Mapping[str, int]) -> Key:
        digest = hashlib.sha256(network.param.encode() + network.weights).hexdigest()
        return Key(
            network=digest,
            symbols=dict(symbols),
            threads=self._threads,
            machine=(cpu_name(), os.cpu_count() or 0),
            versions=(__version__, self._ncnn.description, self._source.description),
        )
