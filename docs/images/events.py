"""Make docs/images/events.png, a frame of a clip, its events and two bins of their voxel grid, and events-summary.png,
what `stepcell events` draws of all its events.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from stepcell.event_spec import EventSpec, EventWindow
from stepcell.models.zoo.clips import HELD_OUT, read_clip
from stepcell.runtime.media.events import Events, event_tensor, simulate_events, write_dat
from stepcell.runtime.media.events.picture import write_event_picture
from stepcell.runtime.media.events.summary import summarise_events

FPS, FRAME = 30, 60


def coloured(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Red where it became brighter, blue where darker, white where nothing happened."""
    share = np.clip(values / np.abs(values).max() * 2, -1, 1)[..., None]
    red, blue = np.array([215, 48, 39]), np.array([44, 90, 180])
    shaded = 255 + np.where(share > 0, red - 255, blue - 255) * np.abs(share)
    return np.rint(shaded).astype(np.uint8)


def main() -> None:
    """Write the pictures beside this file."""
    clip = read_clip(HELD_OUT)
    frames = clip[FRAME - 1 : FRAME + 1]
    height, width = frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "events.dat"
        write_dat(recording, simulate_events(clip, FPS), (width, height))
        write_event_picture(
            Path(__file__).with_name("events-summary.png"), summarise_events(recording), (width, height), 30_000
        )
    events = Events.join(list(simulate_events(frames, FPS)))
    window = EventWindow(size=1e6 / FPS, unit="us")
    total = event_tensor(events, EventSpec(representation="histogram", bins=1, window=window), height, width)
    grid = event_tensor(events, EventSpec(representation="voxel_grid", bins=5, window=window), height, width)
    panels = np.concatenate([frames[1], *map(coloured, (total[0], grid[0], grid[4]))], axis=1)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(panels), format="rgb24")
    picture.save(str(Path(__file__).with_name("events.png")))


if __name__ == "__main__":
    main()
