"""Instructions of whole warps: matrices to and from shared memory, and matrix products.

Products are summed in float32 in the order of NumPy; order and rounding of a tensor core differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Fault, Instruction, Register, Vector

if TYPE_CHECKING:
    from tools.ptx_emulator.cta import Cta
    from tools.ptx_emulator.scalar import Run

__all__ = ["described", "registers_of", "tensor_core"]

_LANE = np.arange(32)


def tensor_core(instruction: Instruction) -> Run | None:
    """Compile an instruction of this module to a function; None: another module handles it."""
    words = instruction.opcode
    if words[0] in ("ldmatrix", "stmatrix"):
        return _matrices(instruction)
    if words[0] == "mma":
        if words[1:4] != ("sync", "aligned", "m16n8k16") or words[-4:] != ("f32", "f16", "f16", "f32"):
            raise instruction.fault("this product is not known")
        return _mma(instruction)
    if words[:2] == ("wgmma", "mma_async"):
        return _wgmma(instruction)
    return None


def registers_of(operand: Any) -> tuple[Register, ...]:
    """The registers of a vector operand."""
    assert isinstance(operand, Vector)
    return tuple(item for item in operand.items if isinstance(item, Register))


def _matrices(instruction: Instruction) -> Run:
    """8 x 8 matrices of two-byte values: lane 8 i + j has the address of row j of matrix i."""
    words, load = instruction.opcode, instruction.opcode[0] == "ldmatrix"
    address, vector = instruction.operands if not load else instruction.operands[::-1]
    count, transposed, registers = int(words[4][1:]), "trans" in words, registers_of(vector)
    if words[1:4] != ("sync", "aligned", "m8n8") or words[-1] != "b16" or len(registers) != count:
        raise instruction.fault("these matrices are not known")
    row, pair = _LANE // 4, _LANE % 4 * 2

    def run(cta: Cta, mask: Any) -> None:
        assert mask is None
        rows = cta.shared_addresses(address).reshape(-1, 32)[:, : 8 * count]
        threads = np.arange(cta.threads).reshape(-1, 32)[:, : 8 * count].ravel()
        warps = len(rows)
        if load:
            bytes_ = cta.shared.read(rows.ravel(), 16, threads)
            matrices = bytes_.view(np.uint16).reshape(warps, count, 8, 8)
            if transposed:
                matrices = matrices.swapaxes(2, 3)
            for number, register in enumerate(registers):
                both = np.stack([matrices[:, number, row, pair], matrices[:, number, row, pair + 1]], -1)
                cta.put(register, both.reshape(-1).view(np.uint32), None)
            return
        matrices = np.empty((warps, count, 8, 8), np.uint16)
        for number, register in enumerate(registers):
            both = cta.parts(register, np.uint16).reshape(warps, 32, 2)
            matrices[:, number, row, pair], matrices[:, number, row, pair + 1] = both[..., 0], both[..., 1]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        cta.shared.write(rows.ravel(), values, threads)

    return run


def _rows(cta: Cta, registers: tuple[Register, ...]) -> NDArray[np.float32]:
    """The left operand (warps, 16, 16) from its four registers."""
    result = np.empty((cta.threads // 32, 16, 16), np.float32)
    for number, register in enumerate(registers):
        i, k = number % 2 * 8, number // 2 * 8
        result[:, i : i + 8, k : k + 8] = cta.parts(register, np.float16).reshape(-1, 8, 8)
    return result


def _mma(instruction: Instruction) -> Run:
    """Per warp, (16, 16) x (16, 8); lane 4 g + t has rows g and g + 8, and columns 2 t and 2 t + 1."""
    d, a, b, c = map(registers_of, instruction.operands)

    def run(cta: Cta, mask: Any) -> None:
        assert mask is None
        warps = cta.threads // 32
        right = np.empty((warps, 16, 8), np.float32)
        for number, register in enumerate(b):
            part = cta.parts(register, np.float16).reshape(warps, 8, 8)
            right[:, 8 * number : 8 * number + 8] = part.swapaxes(1, 2)
        product = _rows(cta, a) @ right
        for number, (target, source) in enumerate(zip(d, c, strict=True)):
            part = product[:, number // 2 * 8 : number // 2 * 8 + 8, number % 2 :: 2]
            cta.put(target, cta.get(source, np.float32) + part.reshape(-1), None)

    return run


def _swizzled(addresses: NDArray[np.int64], row_bytes: int) -> NDArray[np.int64]:
    """Swizzle: permute the 16-byte units of a row by the row number, for rows of 128, 64 or 32 bytes."""
    return addresses ^ (addresses >> 7 & row_bytes // 16 - 1) << 4


def _wgmma(instruction: Instruction) -> Run:
    """Four warps, (64, 16) x (16, N); B in shared memory, described by 64 bits, A too or in registers as for mma."""
    words = instruction.opcode
    vector, left, right, scale, *flags = instruction.operands
    if words[-3:] != ("f32", "f16", "f16") or len(flags) != (3 if isinstance(left, Vector) else 4):
        raise instruction.fault("this product is not known")
    columns, registers = int(words[4].split("n")[1].split("k")[0]), registers_of(vector)
    signs, transposes = flags[:2], flags[2:]

    def run(cta: Cta, mask: Any) -> None:
        assert mask is None
        if cta.threads != 128 or any(int(cta.get(s, np.int32)[0]) != 1 for s in signs):
            raise instruction.fault("only of four warps, without signs")
        first, last = (bool(cta.get(t, np.uint32)[0]) for t in (transposes[0], transposes[-1]))
        a = (
            _rows(cta, registers_of(left))
            if isinstance(left, Vector)
            else described(cta, cta.uniform(left), 64, transposed=first)
        )
        b = described(cta, cta.uniform(right), columns, transposed=last)
        product = (a.reshape(64, 16) @ b.T).reshape(4, 2, 8, columns // 8, 4, 2)
        keep = cta.get(scale, np.bool_)[0]
        for number, register in enumerate(registers):
            part = product[:, number // 2 % 2, :, number // 4, :, number % 2].reshape(-1)
            old = cta.get(register, np.float32, running=True) if keep else np.float32(0)
            cta.put(register, old + part, None)
        cta.run_on(registers, registers_of(left) if isinstance(left, Vector) else ())

    return run


def described(
    cta: Cta, description: int, rows: int, *, transposed: bool, blackwell: bool = False
) -> NDArray[np.float32]:
    """Operand (rows, 16) in shared memory by its matrix descriptor; rows are rows of A or columns of B.

    PTX ISA, "Matrix Descriptor Format" and "Strides": bits 0-13 the address, 16-29 the leading byte offset,
    32-45 the stride byte offset, all in units of 16 bytes; 62-63 the swizzle (1, 2, 3: 128, 64, 32 bytes), on
    compute capability 10 and later 61-63 (2, 4, 6).
    """
    start, leading, stride = (description >> shift & 0x3FFF for shift in (0, 16, 32))
    swizzle = description >> 61
    row_bytes = {2: 128, 4: 64, 6: 32}.get(swizzle if blackwell else swizzle & 6)
    if description >> 49 & 7 or row_bytes is None:
        raise Fault("a description with a base offset, or without a swizzle, is not known")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:  # rows in memory run along k
        across = row_bytes // 2
        offsets = row // across * (16 * leading) + k // 8 * (16 * stride) + k % 8 * row_bytes + row % across * 2
    else:
        offsets = row // 8 * (16 * stride) + row % 8 * row_bytes + k * 2
    addresses = _swizzled(16 * start + offsets, row_bytes)
    group = cta.tensor_memory.group if blackwell else cta.group
    return cta.shared.read_in_background(addresses, group).view(np.float16).astype(np.float32)
