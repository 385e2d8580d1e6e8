"""Instructions that each thread executes on its own registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Instruction, Register, Vector

if TYPE_CHECKING:
    from tools.ptx_emulator.cta import Cta

__all__ = ["TYPES", "scalar"]

Array = NDArray[Any]
Run = Callable[["Cta", Any], None]  # program and mask of active threads; None: all

_FLOATS = {"f16": np.float16, "f16x2": np.float16, "f32": np.float32, "f32x2": np.float32}
_SIGNED = {"s8": np.int8, "s16": np.int16, "s16x2": np.int16, "s32": np.int32, "s64": np.int64}
_UNSIGNED = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
TYPES: dict[str, Any] = {
    **{letter + bits: kind for letter in "bu" for bits, kind in _UNSIGNED.items()},
    **_SIGNED,
    **_FLOATS,
    "pred": np.bool_,
}
_WIDER: dict[Any, Any] = {
    np.uint16: np.uint32,
    np.uint32: np.uint64,
    np.int16: np.int32,
    np.int32: np.int64,
}


def _shift_left(value: Array, amount: Array) -> Array:
    width = 8 * value.dtype.itemsize
    shifted = value << np.minimum(amount, width - 1).astype(value.dtype)
    return np.where(amount < width, shifted, 0).astype(value.dtype)


def _shift_right(value: Array, amount: Array) -> Array:
    width = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(amount, width - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(amount < width, shifted, 0).astype(value.dtype)


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero; exact, because 32 bits fit in a float64."""
    quotient: Array = np.trunc(a.astype(np.float64) / b.astype(np.float64)).astype(a.dtype)
    return quotient


def _remainder(a: Array, b: Array) -> Array:
    remainder: Array = a - _quotient(a, b) * b
    return remainder


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:  # one rounding, except for what float64 rounds before
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


_SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "mul": np.multiply,
    "mad": _multiply_add,
    "max": np.fmax,
    "min": np.fmin,
    "ex2": np.exp2,
    "rem": _remainder,
    "fma": _multiply_add,
}
_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "lo": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "hi": np.greater,
    "ge": np.greater_equal,
}


def scalar(instruction: Instruction) -> Run | None:
    """Compile an instruction of this module to a function; None: another module handles it."""
    words, operands = instruction.opcode, instruction.operands
    name, kind = words[0], TYPES.get(words[-1])
    if name in _SPECIAL:
        return _SPECIAL[name](instruction)
    if kind is None:
        return None
    result, *sources = operands
    if name in ("mul", "mad") and words[1] in ("wide", "hi"):
        return _wide(instruction, kind)
    function = _SIMPLE.get(name)
    if name in ("max", "min") and ("NaN" in words or np.dtype(kind).kind != "f"):
        function = np.maximum if name == "max" else np.minimum
    elif name == "div":
        function = np.divide if np.dtype(kind).kind == "f" else _quotient
    if function is None:
        return None

    several = words[-1].endswith("x2")
    if words[-2:] == ("f32", "f16"):  # all but the last source are narrower

        def run_mixed(cta: Cta, mask: Any) -> None:
            narrow = [cta.get(source, np.float16).astype(np.float32) for source in sources[:-1]]
            cta.put(result, function(*narrow, cta.get(sources[-1], np.float32)), mask)

        return run_mixed

    def run(cta: Cta, mask: Any) -> None:
        get = cta.parts if several else cta.get
        cta.put(result, function(*[get(source, kind) for source in sources]), mask)

    return run


def _wide(instruction: Instruction, kind: Any) -> Run:
    (result, a, b, *c), wider = instruction.operands, _WIDER[kind]
    high = instruction.opcode[1] == "hi"

    def run(cta: Cta, mask: Any) -> None:
        product = cta.get(a, kind).astype(wider) * cta.get(b, kind).astype(wider)
        if high:
            product = (product >> wider(8 * np.dtype(kind).itemsize)).astype(kind)
        if c:
            product = product + cta.get(c[0], kind if high else wider)
        cta.put(result, product, mask)

    return run


def _move(instruction: Instruction) -> Run:
    kind, (result, source) = TYPES[instruction.opcode[-1]], instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        if isinstance(source, Vector):  # packed from parts
            part = TYPES[f"b{8 * np.dtype(kind).itemsize // len(source.items)}"]
            parts = [np.broadcast_to(cta.get(item, part), cta.threads) for item in source.items]
            cta.put(result, np.stack(parts, 1).reshape(-1).view(kind), mask)
        elif isinstance(result, Vector):
            part = TYPES[f"b{8 * np.dtype(kind).itemsize // len(result.items)}"]
            for number, item in enumerate(result.items):
                cta.put(item, cta.parts(source, part)[number :: len(result.items)].copy(), mask)
        else:
            cta.put(result, cta.get(source, kind), mask)

    return run


def _shuffle(instruction: Instruction) -> Run:
    if instruction.opcode[1:3] != ("sync", "idx"):
        raise instruction.fault("this shuffle is not known")
    result, source, lane = instruction.operands[:3]

    def run(cta: Cta, mask: Any) -> None:
        first = np.arange(cta.threads) // 32 * 32
        cta.put(result, cta.get(source, np.uint32)[first + (cta.get(lane, np.uint32) & np.uint32(31))], mask)

    return run


def _permute(instruction: Instruction) -> Run:
    """prmt: select four of eight bytes by the digits of the selector; a digit of 8 or more replicates the sign."""
    result, low, high, selector = instruction.operands
    if instruction.opcode != ("prmt", "b32"):
        raise instruction.fault("this permutation is not known")

    def run(cta: Cta, mask: Any) -> None:
        low_part, high_part = (np.broadcast_to(cta.get(o, np.uint32), cta.threads) for o in (low, high))
        both = low_part.astype(np.uint64) | high_part.astype(np.uint64) << np.uint64(32)
        digits = np.broadcast_to(cta.get(selector, np.uint32), cta.threads)
        value = np.zeros(cta.threads, np.uint32)
        for place in range(4):
            digit = digits >> np.uint32(4 * place) & np.uint32(15)
            byte = (both >> (digit & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
            byte = np.where(digit > 7, np.where(byte > 127, 255, 0), byte)
            value |= byte.astype(np.uint32) << np.uint32(8 * place)
        cta.put(result, value, mask)

    return run


def _convert(instruction: Instruction) -> Run:
    (result, *sources), words = instruction.operands, instruction.opcode
    to, origin = TYPES[words[-2]], TYPES[words[-1]]
    if words[-2] == "f16x2":  # the first source is the upper half

        def run_pair(cta: Cta, mask: Any) -> None:
            high, low = (np.broadcast_to(cta.get(s, origin).astype(to), cta.threads) for s in sources)
            cta.put(result, np.stack([low, high], 1).reshape(-1), mask)

        return run_pair

    def run(cta: Cta, mask: Any) -> None:
        cta.put(result, cta.get(sources[0], origin).astype(to), mask)

    return run


def _select(instruction: Instruction) -> Run:
    kind, (result, a, b, predicate) = TYPES[instruction.opcode[-1]], instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        cta.put(result, np.where(cta.get(predicate, np.bool_), cta.get(a, kind), cta.get(b, kind)), mask)

    return run


def _compare(instruction: Instruction) -> Run:
    if len(instruction.operands) != 3 or not isinstance(instruction.operands[0], Register):
        raise instruction.fault("this comparison is not known")
    kind, (result, a, b) = TYPES[instruction.opcode[-1]], instruction.operands
    function = _COMPARE[instruction.opcode[1]]

    def run(cta: Cta, mask: Any) -> None:
        cta.put(result, function(cta.get(a, kind), cta.get(b, kind)), mask)

    return run


def _field(instruction: Instruction) -> Run:
    kind, (result, source, first, length) = TYPES[instruction.opcode[-1]], instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        start, count = (int(cta.get(o, np.uint32).flat[0]) for o in (first, length))
        bits = 8 * np.dtype(kind).itemsize
        if not 0 < count <= bits - start:
            raise instruction.fault("this bit field is not known")
        up, down = (np.asarray(n, kind) for n in (bits - start - count, bits - count))
        cta.put(result, (cta.get(source, kind) << up) >> down, mask)

    return run


def _shift(instruction: Instruction) -> Run:
    kind, (result, source, amount) = TYPES[instruction.opcode[-1]], instruction.operands
    function = _shift_left if instruction.opcode[0] == "shl" else _shift_right

    def run(cta: Cta, mask: Any) -> None:
        cta.put(result, function(cta.get(source, kind), cta.get(amount, np.uint32)), mask)

    return run


_SPECIAL: dict[str, Callable[[Instruction], Run]] = {
    "mov": _move,
    "prmt": _permute,
    "shfl": _shuffle,
    "cvt": _convert,
    "selp": _select,
    "setp": _compare,
    "bfe": _field,
    "shl": _shift,
    "shr": _shift,
}
