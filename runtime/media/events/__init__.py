"""Event cameras: event files to the tensors a model was trained on. See docs/events.md."""

from __future__ import annotations

from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.dat import write_dat
from stepcell.runtime.media.events.formats import EVENT_FILES
from stepcell.runtime.media.events.simulate import simulate_events
from stepcell.runtime.media.events.source import EventSource
from stepcell.runtime.media.events.tensor import event_tensor

__all__ = ["EVENT_FILES", "EventSource", "Events", "event_tensor", "simulate_events", "write_dat"]
