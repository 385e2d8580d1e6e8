"""RAW recordings that do not state the size of their sensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepcell.runtime.media.events.formats import open_events
from stepcell.runtime.media.events.sensors import known_sensor
from tests.runtime.media.events.files import assert_same, read, sensor, some_events, write_raw
from tests.runtime.media.events.test_readers import encode_evt2

VGA, HD = (640, 480), (1280, 720)


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        # as cameras of 2020 and 2021 wrote them
        (["evt 2.0", "integrator_name Prophesee", "plugin_name hal_plugin_gen3_fx3", "system_ID 21"], VGA),
        (["evt 2.0", "integrator_name Prophesee", "plugin_name hal_plugin_gen31_fx3", "system_ID 28"], VGA),
        (["evt 2.0", "integrator_name Prophesee", "plugin_name hal_plugin_gen41_evk3", "system_ID 48"], HD),
        (["evt 3.0", "system_ID 49"], HD),
        (["evt 3.0", "plugin_name hal_plugin_gen31_evk3"], VGA),
        (["evt 3.0", "plugin_name hal_plugin_gen4_fx3"], HD),
        (["evt 3.0", "plugin_name hal_plugin_imx636_evk4"], HD),
        (["evt 3.0", "plugin_name hal_plugin_genx320"], (320, 320)),
        (["evt 3.0", "plugin_name hal_plugin_prophesee"], None),
        (["evt 3.0", "system_ID 7"], None),
        (["evt 3.0", "system_ID 49", "integrator_name Other"], None),
        (["evt 3.0", "system_ID 49", "geometry 320x320"], (320, 320)),
    ],
)
def test_the_camera_says_the_size(lines: list[str], size: tuple[int, int] | None, tmp_path: Path) -> None:
    assert sensor(write_raw(tmp_path / "e.raw", np.zeros(4, "<u4"), *lines)) == size


@pytest.mark.parametrize(("system", "encoding"), [(21, "2"), (26, "2"), (40, "3"), (48, "3"), (153, "2")])
def test_the_camera_says_the_encoding(system: int, encoding: str) -> None:
    found = known_sensor({"system_id": str(system)})
    assert found is not None
    assert found.encoding == encoding


def test_a_header_without_an_encoding(tmp_path: Path) -> None:
    events = some_events(500)
    assert_same(read(write_raw(tmp_path / "e.raw", encode_evt2(events), "system_ID 21")), events)


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    events = some_events(500)
    path = write_raw(tmp_path / "E.RAW", encode_evt2(events), "evt 2.0", "geometry 640x480")
    assert_same(read(path), events)
    reader = open_events(path)
    assert reader.format == "RAW, EVT 2.0"
    reader.close()
