"""The header of the .npy files that stepcell writes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from stepcell.overwrite import ARRAY_HEADER

__all__ = ["array_header"]


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file in C order; its length does not depend on the number of frames."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    magic, text = buffer.getvalue()[:8], buffer.getvalue()[10:].rstrip()
    padded = text.ljust(ARRAY_HEADER - 11) + b"\n"  # more spaces than NumPy's own: the mark of stepcell's arrays
    return magic + len(padded).to_bytes(2, "little") + padded
