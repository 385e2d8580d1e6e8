"""Vectors of libcaer_cmp, as event_camera_codecs decodes them."""

from __future__ import annotations

import numpy as np

from stepcell.runtime.media.events.libcaer_cmp import LibcaerCmp


def test_by_hand() -> None:
    words = [
        0x3805,  # rising at row 5: column 0 and time 0 apply
        0x0001,  # upper half of the time 1: 4096 us
        0x1002,  # lower half 2
        0x2064,  # column 100
        0x3010,  # falling at row 16
        0x4820,  # rising vector from row 32
        0x5081,  # rows 32 and 39
        0x5002,  # row 41
        0x6FFF,  # other words are skipped
        0x0002,  # the lower half stays
        0x5001,  # row 48
    ]
    decoder = LibcaerCmp()
    events = decoder.decode(np.array(words, "<u2"), 10)
    assert events.x.tolist() == [0, 100, 100, 100, 100, 100]
    assert events.y.tolist() == [5, 16, 32, 39, 41, 48]
    assert events.p.tolist() == [True, False, True, True, True, True]
    assert events.t.tolist() == [10, 4108, 4108, 4108, 4108, 8204]
    later = decoder.decode(np.array([0x5003, 0x3001], "<u2"), 20_000)  # column and vector go on, time does not
    assert [getattr(later, name).tolist() for name in "xypt"] == [
        [100] * 3, [56, 57, 1], [True, True, False], [20_000] * 3
    ]  # fmt: skip
    assert len(decoder.decode(np.empty(0, "<u2"), 0)) == 0
