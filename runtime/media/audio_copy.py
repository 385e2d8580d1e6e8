"""Sound of a video file, copied without decoding into a video that is being written."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from stepcell.errors import InputError
from stepcell.optional_imports import require
from stepcell.runtime.media.ffmpeg_input import input_options
from stepcell.runtime.media.video_reader import open_container

__all__ = ["AudioCopy"]

_ADTS = b"\xff"  # first byte of its synchronisation word


class AudioCopy:
    """Copies the first audio track of a file, as far as the pictures have come.

    Args:
        path: the file; read a second time, beside its pictures.

    Attributes:
        codec: of the sound, such as "aac".

    Raises:
        InputError: the file cannot be opened, or has no sound.
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._av = av = require("av", extra="video", purpose="copying sound")
        try:
            self._source = open_container(av, f"file:{path}", options=input_options(str(path), av.formats_available))
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
        if not self._source.streams.audio:
            self._source.close()
            raise InputError(f"{path}: has no sound to copy", hint="omit --audio copy")
        self._stream = self._source.streams.audio[0]
        self.codec: str = self._stream.codec_context.codec.canonical_name
        self._packets = self._source.demux(self._stream)
        self._next: Any = None
        self._filter: Callable[[Any], list[Any]] = lambda packet: [packet]
        self._target: Any = None
        self._start = Fraction(0)
        self._last = -1

    def fits(self, container_format: str) -> bool:
        """Whether a format of FFmpeg, such as "mp4", can hold this sound."""
        with self._av.open(io.BytesIO(), "w", format=container_format) as probe:
            try:
                probe.add_stream_from_template(self._stream)
            except (ValueError, self._av.FFmpegError):
                return False
        return True

    def begin(self, container: Any, *, start: float) -> None:
        """Add the track to a container; before its first packet.

        Args:
            container: of the video.
            start: timestamp of its first picture on the clock of the file, in seconds.
        """
        self._container, self._start = container, Fraction(start)
        self._target = container.add_stream_from_template(self._stream)
        self._advance()
        if self.codec == "aac" and self._next is not None and bytes(self._next)[:1] == _ADTS:
            # Transport streams repeat a header in every packet; other formats have it once.
            bitstream = require("av.bitstream", extra="video", purpose="copying sound")
            self._filter = bitstream.BitStreamFilterContext("aac_adtstoasc", self._stream).filter

    def copy(self, *, until: float) -> None:
        """Copy what sounds before this time on the clock of the file, in seconds."""
        while self._next is not None and self._next.pts * self._next.time_base < until:
            packet = self._next
            shift = round(self._start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            if packet.dts > self._last and packet.pts >= 0:
                self._last = packet.dts
                for each in self._filter(packet):
                    each.stream = self._target
                    self._container.mux(each)
            self._advance()

    def _advance(self) -> None:
        self._next = next((each for each in self._packets if each.pts is not None and each.dts is not None), None)

    def close(self) -> None:
        self._source.close()
