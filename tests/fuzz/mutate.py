"""Mutations of bytes, JSON documents, archives and ONNX models; all of them follow from the random generator given.

A mutator takes a file that a mutator has made before as well, whatever is left of its structure.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from stepcell.seal import ZEROS, sealed

__all__ = ["Mutator", "mutate_bytes", "mutate_json", "mutate_onnx", "mutate_safetensors", "mutate_zip", "sealing"]

Mutator = Callable[[bytes, random.Random], bytes]
_NUMBERS = [0, -1, 1, 2, 3, 7, 255, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 0.4, -0.5, 1e-300, 1e300, 1e-9, 100_000]
_TEXTS = [
    *("", "x", "h", "height", "height // 0", "height - 9999", "a" * 2000, "\x1b[2J", "é漢😀", "NCHW", "NHWC", "NC"),
    *("float16", "int64", "zeros", "../x", "/etc/passwd", "%d", "us", "events", "1.0", "1.999", "2.0", "null", "batch"),
    "\u202e",
]
_TOKENS = [
    *(b"", b"\0", b"\xff\xfe", b"\xc3\x28", b'"', b"[" * 3000, b'{"a":' * 3000, b"1e999", b"-", b"null", b"NaN"),
    *(b"\\ud800", b"%", b"\n", b"\x1b[2J"),
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, replace, insert, remove, repeat or truncate, one to eight times."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        at = rng.randrange(size + 1) if rng.random() < 0.7 else min(size, rng.randrange(64))
        kind = rng.randrange(7)
        if kind == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            changed[at:at] = rng.choice(_TOKENS)
        elif kind == 3:
            del changed[at : at + rng.choice((1, 2, 4, 16, 200))]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
        elif kind == 5:
            del changed[at:]
        else:
            width = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, rng.randrange(1 << 8 * width)))
            changed[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return bytes(changed)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change values, types, names and presence of fields; now and then the bytes instead."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(document)
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(_TEXTS)] = holder[key]
        elif kind == 2:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key])) if rng.random() < 0.5 else holder.pop(key)
        else:
            holder[key] = _value(rng)
    return json.dumps(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys, however deep."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        holder = left.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                left.append(holder[key])
    return found


def _value(rng: random.Random) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_TEXTS),
        lambda: rng.choice((None, True, False, [], {})),
        lambda: [rng.choice(_NUMBERS) for _ in range(rng.randrange(6))],
        lambda: [rng.choice(_TEXTS) for _ in range(rng.randrange(6))],
    ]
    return rng.choice(choices)()


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Change the content of entries, under check sums that fit; now and then the archive itself."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # zipfile raises many types for damaged archives
        return mutate_bytes(data, rng)
    chosen = rng.randrange(len(entries)) if entries else 0
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for number, (entry, content) in enumerate(entries):
            if number == chosen and rng.random() < 0.05:
                continue
            name = zipfile.ZipInfo(entry.filename)
            name.compress_type = entry.compress_type
            archive.writestr(name, mutate_bytes(content, rng) if number == chosen else content)
    return changed.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON of the header, with its length to fit; now and then the bytes."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if rng.random() < 0.3 or not 0 < length <= len(data) - 8:
        return mutate_bytes(data, rng)
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def sealing(mutate: Mutator, field: bytes) -> Mutator:
    """A mutator whose files have a seal that fits in half of the cases, as by somebody who means it.

    Args:
        field: as of `stepcell.seal.sealed`.
    """

    def mutated(data: bytes, rng: random.Random) -> bytes:
        changed = mutate(data, rng)
        start = changed.rfind(field) + len(field)
        if rng.random() < 0.5 or start < len(field):
            return changed
        return sealed(changed[:start] + ZEROS.encode() + changed[start + len(ZEROS) :], field)

    return mutated


def mutate_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change fields of messages anywhere in a model: numbers, names, shapes, types, and what is repeated."""
    import onnx

    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # DecodeError is not public
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        fields = [(message, field) for message in _messages(model) for field, _ in message.ListFields()]
        if not fields:
            break
        message, field = rng.choice(fields)
        value = getattr(message, field.name)
        if hasattr(value, "append") and len(value):
            at = rng.randrange(len(value))
            kind = rng.randrange(3)
            if kind == 0:
                del value[at]
            elif kind == 1 and not hasattr(value[at], "ListFields"):
                value[at] = _scalar(value[at], rng)
            elif hasattr(value[at], "ListFields"):
                value.add().CopyFrom(value[at])
            else:
                value.append(value[at])
        elif isinstance(value, (int, float, str, bytes)) and rng.random() < 0.8:
            try:
                setattr(message, field.name, _scalar(value, rng))
            except (ValueError, TypeError):  # not in the range of the field
                message.ClearField(field.name)
        else:
            message.ClearField(field.name)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Any:
    yield message
    for _, value in message.ListFields():
        for each in value if hasattr(value, "append") else (value,):
            if hasattr(each, "ListFields"):
                yield from _messages(each)


def _scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str):
        return rng.choice([text for text in _TEXTS if text.isprintable()])
    if isinstance(value, bytes):
        return mutate_bytes(value, rng)
    if isinstance(value, float):
        return float(rng.choice(_NUMBERS))
    return rng.choice((0, 1, 2, -1, 10, 11, 16, 17, 100, 1 << 30, (1 << 31) - 1, 1 << 62, value + 1))
