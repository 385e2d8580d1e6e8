"""ByteStream: the bytes of a pipe or a TCP connection as they come, in bounded memory and without waiting for ever."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from stepcell.errors import InputError, UsageError

__all__ = ["TCP", "WAIT_SECONDS", "ByteStream", "host_and_port", "is_fifo", "open_byte_stream"]

TCP = "tcp://"
STDIN = "-"
WAIT_SECONDS = 0.1  # for more bytes, before the reader is told that none came
CONNECT_SECONDS = 10.0
_PIPE_SIZE = 1 << 20  # bytes; the default of 64 kB would wake the reader 1200 times a second at 80 MB/s
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ, which Python 3.10 names and earlier headers do not


class ByteStream:
    """A file descriptor that is read as bytes come.

    The first bytes are read like a file of which a little can be read again: the header. `read_available` reads the
    rest.

    Args:
        name: for messages.
        descriptor: of a pipe or a socket; closed by `close`.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._head, self._at = b"", 0  # the bytes of the header, and the place in them
        self._interrupted = False

    def tell(self) -> int:
        """Bytes of the header that were read."""
        return self._at

    def seek(self, position: int) -> None:
        """Go back to a place in the header."""
        self._at = position

    def read(self, size: int) -> bytes:
        """Wait for `size` bytes; fewer at the end."""
        while len(self._head) < self._at + size and (more := self._wait(size)):
            self._head += more
        data = self._head[self._at : self._at + size]
        self._at += len(data)
        return data

    def readline(self, limit: int) -> bytes:
        """Wait for a line of at most `limit` bytes."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
        return line

    def read_available(self, size: int) -> bytes | None:
        """Bytes that have come, at most `size`; none at the end. None: nothing came for `WAIT_SECONDS`."""
        if self._at < len(self._head):
            data = self._head[self._at : self._at + size]
            self._at += len(data)
            return data
        if not self._ready(WAIT_SECONDS):
            return b"" if self._interrupted else None
        data = self._read(size)
        while data and len(data) < size and self._ready(0.0):
            more = self._read(size - len(data))
            data += more
            if not more:
                break
        return data

    def interrupt(self) -> None:
        """The end comes as soon as nothing else does; called from any thread."""
        self._interrupted = True

    def close(self) -> None:
        """Close the descriptor."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _wait(self, size: int) -> bytes:
        while not self._ready(WAIT_SECONDS):
            if self._interrupted:
                return b""
        return self._read(size)

    def _ready(self, seconds: float) -> bool:
        return bool(self._poll.poll(seconds * 1e3))

    def _read(self, size: int) -> bytes:
        try:
            return os.read(self._descriptor, size)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror})") from error


def is_fifo(path: Path) -> bool:
    """Whether a path is a named pipe, or a device such as /dev/stdin."""
    with contextlib.suppress(OSError):
        return path.is_fifo() or path.is_char_device()
    return False


def open_byte_stream(text: str) -> ByteStream:
    """Open stdin (`-`), a named pipe or `tcp://HOST:PORT`. A pipe that nobody writes yet is waited for by its reader.

    Raises:
        UsageError: no host and port.
        InputError: it cannot be opened or connected to.
    """
    try:
        if text.startswith(TCP):
            return ByteStream(text, _connect(text))
        if text == STDIN:
            if sys.stdin is None:
                raise InputError("stdin: is closed")
            # A duplicate, because a thread may still read when the interpreter closes sys.stdin at exit.
            stream = ByteStream("stdin", os.dup(sys.stdin.fileno()))
        else:
            # Without O_NONBLOCK, opening would wait for the writer.
            stream = ByteStream(text, os.open(text, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        raise InputError(f"{text}: cannot be opened ({error.strerror or error})") from error
    with contextlib.suppress(OSError):  # not a pipe, or more than this user may have
        fcntl.fcntl(stream._descriptor, _SET_PIPE_SIZE, _PIPE_SIZE)
    return stream


def host_and_port(text: str, scheme: str) -> tuple[str, int]:
    """Host and port of a URL such as `tcp://192.168.0.7:9000`.

    Raises:
        UsageError: a URL of another form.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or text.rstrip("/") != f"{scheme}{parts.netloc}":
        raise UsageError(f"--input {text}: expected {scheme}HOST:PORT", hint=f"such as {scheme}192.168.0.7:9000")
    return host, port


def _connect(text: str) -> int:
    connection = socket.create_connection(host_and_port(text, TCP), CONNECT_SECONDS)
    connection.settimeout(None)
    # A sender whose cable was pulled says nothing: it is asked after 10 s, and lost when three answers are missing.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection.detach()
