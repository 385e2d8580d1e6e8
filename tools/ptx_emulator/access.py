"""Loads, stores, copies, atomics and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Address, Fault, Immediate, Instruction, Operand, Vector
from tools.ptx_emulator.scalar import TYPES

if TYPE_CHECKING:
    from tools.ptx_emulator.cta import Cta
    from tools.ptx_emulator.scalar import Run

__all__ = ["access"]


def access(instruction: Instruction) -> Run | None:
    """Compile an instruction of this module to a function; None: another module handles it."""
    maker = _MAKERS.get(instruction.opcode[0])
    return None if maker is None else maker(instruction)


def _threads(cta: Cta, mask: Any) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.arange(cta.threads) if mask is None else mask.nonzero()[0]
    return found


def _parts(instruction: Instruction) -> tuple[int, int]:
    """Number of elements of a load or store, and bytes of each."""
    count = next((int(word[1:]) for word in instruction.opcode if word in ("v2", "v4", "v8")), 1)
    return count, np.dtype(TYPES[instruction.opcode[-1]]).itemsize


def _registers(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _load(instruction: Instruction) -> Run:
    (result, address), (count, size) = instruction.operands, _parts(instruction)
    space, kind = instruction.opcode[1], TYPES[instruction.opcode[-1]]

    def run(cta: Cta, mask: Any) -> None:
        assert isinstance(address, Address)
        if space == "param":
            assert isinstance(address.base, str)
            value = np.frombuffer(cta.parameter(address.base, size), kind)
            cta.put(result, np.repeat(value, cta.threads), mask)
            return
        threads = _threads(cta, mask)
        if space == "global":
            read = cta.load(address, count * size, threads)
        elif space == "shared":
            read = cta.shared.read(cta.shared_addresses(address)[threads], count * size, threads)
        else:
            raise Fault("memory of this kind is not known")
        values = np.zeros((cta.threads, count * size), np.uint8)
        values[threads] = read
        for number, register in enumerate(_registers(result)):
            part = np.ascontiguousarray(values[:, number * size : (number + 1) * size]).view(kind)[:, 0]
            cta.put(register, part, mask)

    return run


def _store(instruction: Instruction) -> Run:
    (address, source), (count, size) = instruction.operands, _parts(instruction)
    space, kind = instruction.opcode[1], TYPES[instruction.opcode[-1]]
    if space not in ("global", "shared"):
        raise instruction.fault("memory of this kind is not known")

    def run(cta: Cta, mask: Any) -> None:
        threads = _threads(cta, mask)
        parts = [np.broadcast_to(cta.get(item, kind), cta.threads) for item in _registers(source)]
        values = np.stack(parts, 1)[threads].view(np.uint8)
        assert values.shape[1] == count * size
        if space == "global":
            cta.store(address, values, threads)
        else:
            cta.shared.write(cta.shared_addresses(address)[threads], values, threads)

    return run


def _copy(instruction: Instruction) -> Run:
    """cp.async: copy bytes to shared memory, or fill them with zeros if the source size is 0."""
    words = instruction.opcode
    if words[2] == "commit_group":
        return _each(lambda cta: cta.shared.commit())
    if words[2] == "wait_group":
        left = instruction.operands[0]
        return _each(lambda cta: cta.shared.wait(int(cta.get(left, np.uint32)[0])))
    if words[1] != "async" or words[2] not in ("ca", "cg"):
        raise instruction.fault("this copy is not known")
    to, origin, nbytes, *read = instruction.operands
    assert isinstance(nbytes, Immediate)
    size = nbytes.bits

    def run(cta: Cta, mask: Any) -> None:
        threads = _threads(cta, mask)
        count = np.broadcast_to(cta.get(read[0] if read else nbytes, np.uint32), cta.threads)[threads]
        some = count == size
        if count[~some].any():
            raise Fault("a copy of a part is not known")
        values = np.zeros((len(threads), size), np.uint8)
        if some.any():
            values[some] = cta.load(origin, size, threads[some])
        cta.shared.copy(cta.shared_addresses(to)[threads], values, threads)

    return run


def _each(act: Callable[[Cta], None]) -> Run:
    """An instruction that the whole program executes together."""

    def run(cta: Cta, mask: Any) -> None:
        if mask is not None:
            raise Fault("some threads take no part")
        act(cta)

    return run


def _atomic(instruction: Instruction) -> Run:
    if instruction.opcode[1:] != ("global", "gpu", "acq_rel", "add", "u32"):
        raise instruction.fault("this atomic is not known")
    result, address, value = instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        values = np.broadcast_to(cta.get(value, np.uint32), cta.threads)
        old = cta.add_atomically(address, values, _threads(cta, mask))
        cta.put(result, old, mask)

    return run


def _barrier(instruction: Instruction) -> Run:
    if instruction.opcode[1] == "warp":
        return _each(lambda cta: cta.shared.warp_barrier())
    return _each(lambda cta: cta.barrier())


def _products(instruction: Instruction) -> Run:
    word = instruction.opcode[1]
    if word == "commit_group":
        return _each(lambda cta: cta.products_commit())
    if word == "wait_group":
        left = instruction.operands[0]
        return _each(lambda cta: cta.products_wait(int(cta.get(left, np.uint32)[0])))
    return _fence(instruction)


def _fence(_: Instruction) -> Run:
    """A fence; does nothing, because accesses are in order here."""
    return _each(lambda _: None)


_MAKERS: dict[str, Callable[[Instruction], Run]] = {
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "atom": _atomic,
    "bar": _barrier,
    "wgmma": _products,
    "fence": _fence,
}
