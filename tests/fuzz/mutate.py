"""Mutations of bytes, of JSON documents and of ONNX models; all of them follow from the random generator given."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

__all__ = ["mutate_bytes", "mutate_json", "mutate_onnx"]

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
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(document))
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


def _places(value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _value(rng: random.Random) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_TEXTS),
        lambda: rng.choice((None, True, False, [], {})),
        lambda: [rng.choice(_NUMBERS) for _ in range(rng.randrange(6))],
        lambda: [rng.choice(_TEXTS) for _ in range(rng.randrange(6))],
    ]
    return rng.choice(choices)()


def mutate_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change fields of messages anywhere in a model: numbers, names, shapes, types, and what is repeated."""
    import onnx

    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        fields = [(message, field) for message in _messages(model) for field, _ in message.ListFields()]
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
