"""Opening inputs by their names, and the names that are shown."""

from __future__ import annotations

import pytest

from stepcell.errors import InputError, StepcellError
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.source import display_name


@pytest.mark.parametrize("name", ["camera:999", "rtsp://127.0.0.1:9/none", "nothing.mp4", "nothing.npy"])
def test_sources_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=name):
        open_source(name)


@pytest.mark.parametrize(("name", "size"), [("-", None), ("clip.mp4", (6, 4))])
def test_size_belongs_to_stdin(name: str, size: tuple[int, int] | None) -> None:
    with pytest.raises(StepcellError, match="--size"):
        open_source(name, size=size)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtsp://user:pass:w@rd@host/a:b", "rtsp://***@host/a:b"),
        ("rtsp://token@host:554/x", "rtsp://***@host:554/x"),
        ("http://host:80/a:b", "http://host:80/a:b"),
        ("/a:b@c/clip.mp4", "/a:b@c/clip.mp4"),
        ("a\udcff.mp4", "a\\udcff.mp4"),
        ("ü.mp4", "ü.mp4"),
    ],
    ids=ascii,
)
def test_what_is_shown_of_a_name(name: str, expected: str) -> None:
    assert display_name(name) == expected
