"""Event cameras in Python: simulate, write and encode events. Formats and options are in docs/events.md."""

from __future__ import annotations

from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, EventSource, event_tensor, simulate_events, write_dat

__all__ = ["EventSource", "EventSpec", "EventWindow", "Events", "event_tensor", "simulate_events", "write_dat"]
