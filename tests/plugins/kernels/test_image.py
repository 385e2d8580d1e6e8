"""Kernel images on disk: a changed bit anywhere is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from stepcell.errors import InputError
from stepcell.plugins.kernels.image import KernelImage, read_image, write_image
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


@pytest.mark.parametrize("field", ["grid_pixels", "grid_channels", "max_pixels", "warps", "splits"])
def test_a_sealed_one_without_programs_is_refused(tmp_path: Path, field: str) -> None:
    made = image("lstm_step")
    none = KernelImage(msgspec.structs.replace(made.info, **{field: 0}), made.cubin)
    path = write_image(none, tmp_path).with_suffix(".json")
    with pytest.raises(InputError, match=rf"Expected `int` >= 1 - at `\$\.{field}`"):
        read_image(path)
