"""A network to the server's side in this process, which loses, delays and repeats, and whose servers are killed."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from stepcell import StepLoop
from stepcell.client import NotAnswered, RefusedFrame
from stepcell.runtime.serving.protocol import FrameRequest
from stepcell.runtime.serving.snapshot_store import SnapshotStore
from stepcell.runtime.serving.snapshots import StreamSnapshots
from stepcell.runtime.serving.stream_table import StreamTable
from stepcell.runtime.serving.wire import Wire
from tests.runtime.serving.serving_model import clip

__all__ = ["EVERY", "Network"]

EVERY = 5


class Network:
    """A transport to tables in this process, also for several clients. Each `hurt` is a chance per request."""

    def __init__(
        self,
        model: Path,
        folder: Path | None,
        *,
        slots: int = 2,
        hurt: float = 0.0,
        seed: int = 0,
        pixels: bool = False,
        idle: float = 30.0,
    ) -> None:
        self.model, self.folder, self.slots, self.pixels, self.idle = model, folder, slots, pixels, idle
        self._lock = threading.Lock()
        self.hurt, self.rng = hurt, random.Random(seed)
        self.delayed: list[FrameRequest] = []
        self.up = True
        self.start()

    def start(self) -> None:
        self.loop = StepLoop.open(self.model, slots=self.slots, threads=1)
        self.snapshots = None
        if self.folder is not None:
            self.snapshots = StreamSnapshots(self.loop, SnapshotStore(self.folder, keep=3600), EVERY)
        self.wire = Wire(self.loop.contract, self.slots, pixels=self.pixels)
        self.table = StreamTable(
            self.loop, self.wire, slots=self.slots, sample={"x": clip(9, 1)[0]}, idle=self.idle,
            snapshots=self.snapshots,
        )  # fmt: skip

    def restart(self, *, gently: bool = False) -> None:
        if gently:
            self.table.close()
        elif self.snapshots is not None:
            self.snapshots.close()
        self.loop.close()
        self.start()

    def infer(self, request: FrameRequest) -> dict[str, Any]:
        with self._lock:
            return self._infer(request)

    def _infer(self, request: FrameRequest) -> dict[str, Any]:
        if not self.up:
            raise NotAnswered("down")
        if self.rng.random() < self.hurt / 4:
            self.restart(gently=self.rng.random() < 0.3)
        if self.rng.random() < self.hurt:
            if self.rng.random() < 0.5:
                self.delayed.append(request)
            raise NotAnswered("lost request")
        if self.delayed and self.rng.random() < self.hurt:
            self.table.step([self.delayed.pop()])
        (answer,) = self.table.step([request] * (1 + (self.rng.random() < self.hurt)))[:1]
        if self.snapshots is not None:
            self.snapshots.flush()
        if self.rng.random() < self.hurt:
            raise NotAnswered("lost answer")
        if isinstance(answer, RefusedFrame):
            raise answer
        return answer

    def snapshot_every(self) -> int | None:
        return None if self.folder is None else EVERY

    def close(self) -> None:
        pass
