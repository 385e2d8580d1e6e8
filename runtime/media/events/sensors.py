"""Sensor of an older RAW recording, by the camera that its header names.

Headers state the size of the sensor since Metavision 3. Before, Prophesee's software inferred it, and the encoding,
from the number of the system; the table is that of OpenEB 5.1.1 (hal_psee_plugins, psee_raw_file_header.cpp and
device_system_id.h). The names of the camera plugins contain the sensor's generation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Sensor", "byte_order", "known_sensor"]


class Sensor(NamedTuple):
    """What a header leaves out.

    Attributes:
        size: (width, height) in pixels.
        encoding: "2" or "3": EVT 2.0 or EVT 3.0; "": not known.
    """

    size: tuple[int, int]
    encoding: str


_VGA2, _VGA3 = Sensor((640, 480), "2"), Sensor((640, 480), "3")
_HD2, _HD3 = Sensor((1280, 720), "2"), Sensor((1280, 720), "3")
_SYSTEMS = {
    # generation 3
    21: _VGA2, 23: _VGA2, 25: _VGA2, 29: _VGA2, 33: _VGA2, 151: _VGA2, 153: _VGA2, 161: _VGA2,
    # generation 3.1
    28: _VGA2, 34: _VGA2, 35: _VGA2, 41: _VGA2, 162: _VGA2, 40: _VGA3,
    # generations 4 and 4.1
    26: _HD2, 31: _HD2, 39: _HD2, 30: _HD3, 46: _HD3, 48: _HD3,
    # IMX636
    49: _HD3, 50: _HD3,
}  # fmt: skip
_FIRST_LITTLE = 55  # systems below it send EVT 2.1 in the legacy order
_PLUGINS = (
    (r"hal_plugin_gen31?(_|$)", (640, 480)),
    (r"hal_plugin_(gen41?|imx636|imx646)(_|$)", (1280, 720)),
    (r"hal_plugin_genx320(_|$)", (320, 320)),
)


def known_sensor(header: Mapping[str, str]) -> Sensor | None:
    """The sensor of the camera that a header names; None: another maker's camera, or one that is not known.

    Args:
        header: of `read_header`, keys in lower case.
    """
    if not _of_prophesee(header):
        return None
    system = header.get("system_id", "")
    if re.fullmatch(r"\d{1,4}", system) and int(system) in _SYSTEMS:
        return _SYSTEMS[int(system)]
    plugin = header.get("plugin_name", "")
    return next((Sensor(size, "") for pattern, size in _PLUGINS if re.match(pattern, plugin)), None)


def byte_order(header: Mapping[str, str], encoding: str) -> str:
    """Order of the bytes of a word: "little", "big", or "legacy", the upper half first and each half little-endian.

    A header of EVT 2.1 that does not say is read as OpenEB 5.1.1 reads it: legacy from older systems of Prophesee.

    Args:
        header: of `read_header`, keys in lower case.
        encoding: as in the header.
    """
    stated = re.search(r"endianness=(\w+)", encoding)
    if stated is not None or header.get("endianness"):
        return (stated[1] if stated else header["endianness"]).lower()
    system = header.get("system_id", "")
    older = re.fullmatch(r"\d{1,4}", system) is not None and 0 < int(system) < _FIRST_LITTLE
    return "legacy" if older and _of_prophesee(header) else "little"


def _of_prophesee(header: Mapping[str, str]) -> bool:
    """Whether the camera is Prophesee's own; other makers number their systems themselves."""
    makers = (header.get(f"{which}integrator_name", "Prophesee") for which in ("", "plugin_", "camera_"))
    return all(maker == "Prophesee" for maker in makers)
