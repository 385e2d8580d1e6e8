"""Streams on a server that `stepcell triton-repo` set up. Promise and errors are in docs/fleet.md."""

from __future__ import annotations

from stepcell.runtime.serving.client import StreamClient, StreamEvent
from stepcell.runtime.serving.protocol import NotAnswered, RefusedFrame

__all__ = ["NotAnswered", "RefusedFrame", "StreamClient", "StreamEvent"]
