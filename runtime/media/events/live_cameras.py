"""Cameras through the packages of their drivers: `dv://HOST:PORT` and `neuromorphic://SERIAL`."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.library_errors import library_errors
from stepcell.optional_imports import require
from stepcell.runtime.media.events.byte_stream import WAIT_SECONDS, host_and_port
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.names import columns_named
from stepcell.runtime.media.events.reader import EventReader

__all__ = ["CAMERAS", "DvReader", "LiveCamera", "NeuromorphicReader"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.002  # dv-processing has no call that waits


class LiveCamera(EventReader, Protocol):
    """A reader that waits for a camera."""

    def interrupt(self) -> None:
        """End the iteration soon; called from any thread."""
        ...


class DvReader:
    """The events that a DV server sends: the network mode of dv-processing and of iniVation's DV.

    Args:
        url: dv://HOST:PORT.

    Raises:
        UsageError: a URL of another form.
        InputError: nobody answers, or the server sends no events.
        MissingDependencyError: dv-processing is not installed.
    """

    format = "DV network stream"

    def __init__(self, url: str) -> None:
        self.name = url
        host, port = host_and_port(url, "dv://")
        dv = require("dv_processing", extra="dv", purpose="reading dv:// streams")
        try:
            address = socket.gethostbyname(host)
        except OSError as error:
            raise InputError(f"{url}: cannot be opened ({error.strerror or error})") from error
        with library_errors(url, InputError, what="cannot be opened"):
            self._reader: Any = dv.io.NetworkReader(address, port)
            if not self._reader.isEventStreamAvailable():
                raise InputError(f"{url}: {self._reader.getCameraName()} sends no events there")
            width, height = self._reader.getEventResolution()
        self.size: tuple[int, int] | None = (int(width), int(height))
        self._interrupted = False

    def __iter__(self) -> Iterator[Events]:
        waited = time.monotonic()
        while True:
            with library_errors(self.name, InputError, what="cannot be read"):
                running = self._reader.isRunning() and not self._interrupted
                batch = self._reader.getNextEventBatch()
            if batch is not None and batch.size():
                yield _events(batch.numpy())
            elif not running:
                return
            elif time.monotonic() - waited < WAIT_SECONDS:
                time.sleep(_POLL_SECONDS)
                continue
            else:
                yield Events.empty(0)
            waited = time.monotonic()

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self._reader = None  # its destructor ends the connection


class NeuromorphicReader:
    """The events of a camera at USB or Ethernet, through neuromorphic-drivers.

    Args:
        url: neuromorphic://SERIAL, or neuromorphic:// for the only camera.

    Raises:
        InputError: no such camera, or it cannot be opened.
        MissingDependencyError: neuromorphic-drivers is not installed.
    """

    format = "neuromorphic-drivers"

    def __init__(self, url: str) -> None:
        self.name = url
        drivers = require("neuromorphic_drivers", extra="neuromorphic", purpose="reading neuromorphic:// cameras")
        serial = url.removeprefix("neuromorphic://").strip("/")
        with library_errors(url, InputError, what="cannot be opened", hint="neuromorphic-drivers lists the cameras"):
            self._device: Any = drivers.open(serial=serial or None, iterator_timeout=WAIT_SECONDS)
            properties = self._device.properties()
        self.size: tuple[int, int] | None = (int(properties.width), int(properties.height))
        self._lost = 0  # times that the computer was too slow for the camera
        self._interrupted = False

    def __iter__(self) -> Iterator[Events]:
        while not self._interrupted:
            with library_errors(self.name, InputError, what="cannot be read"):
                try:
                    _, packet = next(self._device)
                except StopIteration:
                    return
            events = packet.polarity_events if packet is not None else None
            if packet is not None and packet.polarity_events_overflow_indices is not None:
                self._say_lost(len(packet.polarity_events_overflow_indices))
            yield _events(events) if events is not None else Events.empty(0)

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._device.close()
        if self._lost > 1:
            logger.warning(f"{self.name}: events were lost {self._lost} times")

    def _say_lost(self, times: int) -> None:
        if times and not self._lost:
            logger.warning(f"{self.name}: events were lost: they came faster than they were read")
        self._lost += times


CAMERAS: dict[str, Callable[[str], LiveCamera]] = {"dv://": DvReader, "neuromorphic://": NeuromorphicReader}


def _events(records: NDArray[Any]) -> Events:
    """Events of a structured array, whatever its fields are called."""
    names = columns_named(records.dtype.names or ())
    if names is None:
        raise InputError(f"events: expected the fields x, y, p and t, got {records.dtype.names}")
    x, y, p, t = (np.ascontiguousarray(records[name]) for name in names)
    return Events(x, y, p > 0, t.astype(np.int64))
