"""The model that Triton's Python back end runs; the `model.py` of a repository only imports it."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepcell.dims import resolve
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.serving.protocol import CLIENT, ID, NUMBER, STEPPED, FrameRequest, RefusedFrame
from stepcell.runtime.serving.settings import Settings
from stepcell.runtime.serving.snapshot_store import SnapshotStore
from stepcell.runtime.serving.snapshots import StreamSnapshots
from stepcell.runtime.serving.stream_table import StreamTable
from stepcell.runtime.serving.wire import Wire
from stepcell.sample_frames import smooth_frame

__all__ = ["TritonPythonModel"]

_SIZE = 64  # of a sample frame, where the export says nothing
_METRIC_SECONDS = 0.5  # from one update to the next: an update takes the time of a small step


class TritonPythonModel:
    """One instance: a process with a step loop of its own. Methods are those that the back end calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model, and step one frame; an error ends the load of the model."""
        import triton_python_backend_utils as server  # of the back end's process

        self._server: Any = server
        logging.getLogger("stepcell").addHandler(_ToServer(server.Logger))
        config = json.loads(args["model_config"])
        settings = Settings.from_parameters(config["parameters"])
        folder = Path(args["model_repository"], args["model_version"])
        slots = settings.slots
        threads = max(1, (os.cpu_count() or 1) // sum(group["count"] for group in config["instance_group"]))
        device = settings.device
        if device == "cuda":
            device = f"cuda:{args['model_instance_device_id']}"
        # Not whichever is faster here: a state may go on at another server, bit by bit as at this one.
        # And its threads sleep while frames are on their way: others need the cores then.
        loop = StepLoop.open(
            folder / settings.model, device, slots=slots, threads=threads, spin=False, backend="onnxruntime"
        )
        self._wire = Wire(loop.contract, slots, pixels=settings.pixels)
        snapshots = None
        if settings.snapshots:
            store = SnapshotStore(Path(settings.snapshots), keep=settings.keep)
            snapshots = StreamSnapshots(loop, store, settings.snapshot_every)
        self._loop, self._snapshots = loop, snapshots
        self._table = StreamTable(
            loop, self._wire, slots=slots, sample=self._sample(), idle=settings.idle, snapshots=snapshots
        )
        checked = self._table.check({})  # a model that cannot step is not served
        if isinstance(checked, RefusedFrame):
            raise checked
        self._metrics = Metrics(server, args["model_name"], args["model_instance_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch: at most one frame of each stream, as the server's batcher makes it."""
        frames = [self._request(request) for request in requests]
        answers = self._table.step(frames)
        self._metrics.update(self._table, self._snapshots)
        return [self._response(frame, answer) for frame, answer in zip(frames, answers, strict=True)]

    def finalize(self) -> None:
        """Write a snapshot of every stream."""
        self._table.close()
        self._loop.close()

    def _request(self, request: Any) -> FrameRequest:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        controls = {name: int(inputs.pop(name).ravel()[0]) for name in (ID, CLIENT, NUMBER, "START", "END")}
        return FrameRequest(
            controls[ID], controls[CLIENT], controls[NUMBER], inputs, bool(controls["START"]), bool(controls["END"])
        )

    def _response(self, frame: FrameRequest, answer: dict[str, NDArray[Any]] | RefusedFrame) -> Any:
        if isinstance(answer, RefusedFrame):
            return self._server.InferenceResponse(error=self._server.TritonError(answer.message))
        arrays = {**answer, STEPPED: np.array([[frame.number]], np.int64)}
        return self._server.InferenceResponse([self._server.Tensor(name, array) for name, array in arrays.items()])

    def _sample(self) -> dict[str, NDArray[Any]]:
        """A frame of the sizes of the export."""
        contract = self._loop.contract
        sizes = {**dict.fromkeys(contract.symbols, _SIZE), **contract.example}
        sizes |= {dim: 1 for state in contract.states if isinstance(dim := state.streams, str)}
        frames = {}
        for port in self._wire.inputs:
            shape = list(resolve(port.spec.shape, sizes))
            shape[port.axis] = 1
            frames[port.spec.name] = smooth_frame(port.spec, shape, 0)
        return frames


class Metrics:
    """Counters beside the server's own, on its port of metrics. Each change is a message to it, so they are few."""

    def __init__(self, server: Any, model: str, instance: str) -> None:
        self._metrics: dict[str, tuple[Any, Any]] = {}
        self._told: dict[str, int] = {}  # what the server has
        self._next = 0.0  # when it is told more
        labels = {"model": model, "instance": instance}
        family = getattr(server, "MetricFamily", None)  # absent from old servers
        if family is None:
            return
        for name, kind, text in (
            ("stepcell_streams", "GAUGE", "Streams that have a slot"),
            ("stepcell_frames", "COUNTER", "Frames stepped"),
            ("stepcell_repeated", "COUNTER", "Answers given again to a retry"),
            ("stepcell_evicted", "COUNTER", "Idle streams whose slot was given to another"),
            ("stepcell_resumed", "COUNTER", "Streams continued from a snapshot"),
            ("stepcell_refused", "COUNTER", "Frames answered by a named error"),
            ("stepcell_snapshots", "COUNTER", "Snapshots written"),
            ("stepcell_snapshots_failed", "COUNTER", "Snapshots that could not be written"),
        ):
            made = family(name=name, description=text, kind=getattr(family, kind))
            self._metrics[name] = (made, made.Metric(labels=labels))
            self._told[name] = 0

    def update(self, table: StreamTable, snapshots: StreamSnapshots | None) -> None:
        """Take over the counts, if the last time was long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _METRIC_SECONDS
        counts = table.counts
        values = {
            "stepcell_streams": len(table),
            "stepcell_frames": counts.frames,
            "stepcell_repeated": counts.repeated,
            "stepcell_evicted": counts.evicted,
            "stepcell_resumed": counts.resumed,
            "stepcell_refused": sum(counts.refused.values()),
            "stepcell_snapshots": 0 if snapshots is None else snapshots.written,
            "stepcell_snapshots_failed": 0 if snapshots is None else snapshots.failed,
        }
        for name, (_family, metric) in self._metrics.items():
            if values[name] != self._told[name]:
                metric.increment(values[name] - self._told[name])
                self._told[name] = values[name]


class _ToServer(logging.Handler):
    """Writes warnings to the server's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self._logger.log_warn(record.getMessage())
