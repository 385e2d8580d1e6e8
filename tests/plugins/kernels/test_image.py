"""Kernel images on disk: a changed bit anywhere is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepcell.errors import InputError
from stepcell.plugins.kernels.image import read_image, write_image
from tests.plugins.kernels.test_launcher import image


def test_comes_back(tmp_path: Path) -> None:
    written = image("lstm_step")
    path = write_image(written, tmp_path).with_suffix(".json")
    read = read_image(path)
    assert read.cubin == written.cubin
    assert read.info.arguments == written.info.arguments


def test_every_bit_of_the_description_is_sealed(tmp_path: Path) -> None:
    path = write_image(image("gru_gates"), tmp_path).with_suffix(".json")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(InputError):
            read_image(path)
