"""Emulated network camera that a test switches on and off."""

from __future__ import annotations

import contextlib
import io
import socket
import threading

import numpy as np
from numpy.typing import NDArray


class Camera:
    """Sends MPEG-TS over TCP to every client, from the first frame of the clip.

    Attributes:
        url: the same after it was switched off and on.
        cut: share of the clip that is sent before it disconnects.
        connections: number of clients so far.
    """

    def __init__(self, frames: NDArray[np.uint8], fps: int = 25) -> None:
        self._data = _mpegts(frames, fps)
        self.cut = 1.0
        self.connections = 0
        self._server: socket.socket | None = None
        self._port = 0
        self.switch_on()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def switch_on(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()

    def switch_off(self) -> None:
        if self._server is not None:
            self._server.shutdown(socket.SHUT_RDWR)  # interrupts `accept`
            self._server.close()
            self._server = None
            self._thread.join()

    def _serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                self.connections += 1
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self._data[: round(len(self._data) * self.cut)])


def _mpegts(frames: NDArray[np.uint8], fps: int) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
