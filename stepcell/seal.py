"""Seals: a file contains its own SHA-256, computed with 64 zeros in place of that value.

Any changed byte is detected, including those of the seal.
"""

from __future__ import annotations

import hashlib

__all__ = ["ZEROS", "check_seal", "sealed"]

ZEROS = "0" * 64  # a document is written with these first


def sealed(data: bytes, field: bytes) -> bytes:
    """A file with its digest in place of the zeros.

    Args:
        data: the file; ZEROS follow the last occurrence of `field`.
        field: the bytes before the value, such as `b'"checksum": "'`.
    """
    start = data.rindex(field + ZEROS.encode()) + len(field)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + len(ZEROS) :]


def check_seal(data: bytes, field: bytes, recorded: str) -> str | None:
    """The digest of a sealed file if it differs from the recorded one; None: nothing was changed.

    Args:
        data, field: as in `sealed`.
        recorded: the value of the field as it was read.
    """
    start = data.rfind(field + recorded.encode()) + len(field)
    if start < len(field) or len(recorded) != len(ZEROS):
        return "nothing comparable"
    view = memoryview(data)  # a model may have gigabytes
    digest = hashlib.sha256(view[:start])
    digest.update(ZEROS.encode())
    digest.update(view[start + len(ZEROS) :])
    found = digest.hexdigest()
    return None if found == recorded else found
