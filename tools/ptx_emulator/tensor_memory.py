"""Tensor memory of compute capability 10 and 11 (128 lanes, 512 columns of 32 bits) and its instructions.

A product runs in the background from its `tcgen05.mma` until the barrier named by its `tcgen05.commit` has been waited
for. Until then its result and operands may not be accessed. Data stored by a warp must be waited for, and followed by
a barrier, before a product reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.program import Address, Fault, Instruction, Register
from tools.ptx_emulator.tensor_core import described, registers_of

if TYPE_CHECKING:
    from tools.ptx_emulator.cta import Cta
    from tools.ptx_emulator.scalar import Run

__all__ = ["TensorMemory", "tensor_memory"]

_UNKNOWN, _READY, _STORING, _STORED = range(4)
_FIRST = 128  # first column of an allocation; not 0, to find code that assumes so

Cells = tuple[NDArray[np.int64], NDArray[np.int64]]


class TensorMemory:
    """Values, and the background work that uses them."""

    def __init__(self) -> None:
        self.values = np.zeros((128, 512), np.uint32)
        self.allocated = 0
        self._state = np.full((128, 512), _UNKNOWN, np.uint8)
        self._written = np.full((128, 512), -1, np.int32)  # last product that writes it
        self._read = np.full((128, 512), -1, np.int32)  # last product that reads it
        self._products = 0
        self._barriers: dict[int, list[int]] = {}  # by address: phases that are over, products of those to come

    def load(self, cells: Cells) -> NDArray[np.uint32]:
        self._check(cells, ready=(_READY, _STORED))
        return self.values[cells]

    def store(self, cells: Cells, values: NDArray[np.uint32]) -> None:
        self._outside(cells)
        if (self._written[cells] >= 0).any() or (self._read[cells] >= 0).any():
            raise Fault("writes tensor memory that a product in the background uses")
        self.values[cells] = values
        self._state[cells] = _STORING

    def stores_wait(self) -> None:
        self._state[self._state == _STORING] = _STORED

    def barrier(self) -> None:
        self._state[self._state == _STORED] = _READY

    def operand(self, cells: Cells) -> NDArray[np.uint32]:
        """Read an operand of the next product."""
        self._check(cells, ready=(_READY,))
        self._read[cells] = self._products
        return self.values[cells]

    def accumulate(self, cells: Cells, product: NDArray[np.float32], *, keep: bool) -> None:
        """Queue a product. Products complete in order."""
        self._outside(cells)
        if np.isin(self._state[cells], (_STORING, _STORED)).any():
            raise Fault("a product adds to tensor memory that a warp has written, with no wait and barrier since")
        if keep and (self._state[cells] == _UNKNOWN).any():
            raise Fault("a product adds to tensor memory that was never written")
        old = self.values[cells].view(np.float32) if keep else np.float32(0)
        self.values[cells] = (old + product).astype(np.float32).view(np.uint32)
        self._state[cells], self._written[cells] = _READY, self._products
        self._products += 1

    def begin(self, address: int) -> None:
        self._barriers[address] = [0]

    def end(self, address: int) -> None:
        if len(self._barriers.pop(address)) > 1:
            raise Fault("a barrier is taken away that a product has yet to come to")

    def commit(self, address: int) -> None:
        """Signal the barrier when all products so far are complete."""
        self._barriers[address].append(self._products)

    def wait(self, address: int, parity: int) -> int:
        """Wait for the barrier's phase of this parity; products before the returned number are complete."""
        over, *coming = self._barriers[address]
        if over % 2 != parity:  # it is already
            return 0
        if not coming:
            raise Fault("waits for a barrier that nothing will come to")
        done = coming.pop(0)
        self._barriers[address] = [over + 1, *coming]
        self._written[self._written < done] = -1
        self._read[self._read < done] = -1
        return done

    @property
    def group(self) -> int:
        """Number of the next product."""
        return self._products

    @property
    def idle(self) -> bool:
        return not self.allocated and all(len(each) == 1 for each in self._barriers.values())

    def _check(self, cells: Cells, ready: tuple[int, ...]) -> None:
        self._outside(cells)
        if (self._written[cells] >= 0).any():
            raise Fault("reads tensor memory that a product in the background writes")
        if not np.isin(self._state[cells], ready).all():
            raise Fault("reads tensor memory that was never written, or with no wait and barrier since")

    def _outside(self, cells: Cells) -> None:
        if ((cells[1] < _FIRST) | (cells[1] >= _FIRST + self.allocated)).any():
            raise Fault("tensor memory outside what was allocated")


def tensor_memory(instruction: Instruction) -> Run | None:
    """Compile an instruction of this module to a function; None: another module handles it."""
    words, operands = instruction.opcode, instruction.operands
    if words[0] == "elect":
        return _elect(instruction)
    if words[0] == "mbarrier":
        return _mbarrier(instruction)
    if words[0] != "tcgen05":
        return None
    if words[1] in ("ld", "st"):
        return _move(instruction)
    if words[1] == "mma":
        if words[2:] != ("cta_group", "1", "kind", "f16"):
            raise instruction.fault("this product is not known")
        return _product(instruction)

    def run(cta: Cta, mask: Any) -> None:
        memory = cta.tensor_memory
        if words[1] == "alloc":
            memory.allocated = int(cta.get(operands[1], np.uint32)[0])
            where = cta.shared_addresses(operands[0])[:1]
            cta.shared.write(where, np.full(1, _FIRST, np.uint32).view(np.uint8)[None, :], np.zeros(1, np.int64))
        elif words[1] == "dealloc":
            memory.allocated = 0
        elif words[1] == "commit":
            memory.commit(cta.first(operands[0], mask))
        elif words[1:3] == ("wait", "ld"):
            cta.loads_wait()
        elif words[1:3] == ("wait", "st"):
            memory.stores_wait()
        elif words[1] not in ("relinquish_alloc_permit", "fence"):
            raise Fault("it is not known")

    return run


def _elect(instruction: Instruction) -> Run:
    """elect: true in the first lane of every warp."""
    _, predicate = str(instruction.operands[0]).split("|%")

    def run(cta: Cta, mask: Any) -> None:
        cta.put(Register(predicate), np.arange(cta.threads) % 32 == 0, mask)

    return run


def _mbarrier(instruction: Instruction) -> Run:
    words, operands = instruction.opcode, instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        if words[1] == "init":
            if int(cta.get(operands[1], np.uint32)[0]) != 1:
                raise Fault("only barriers for one are known")
            cta.tensor_memory.begin(cta.first(operands[0], mask))
        elif words[1] == "inval":
            cta.tensor_memory.end(cta.first(operands[0], mask))
        elif words[1:3] == ("try_wait", "parity"):
            parity = int(cta.get(operands[2], np.uint32)[0])
            done = cta.tensor_memory.wait(cta.first(operands[1], mask), parity)
            cta.shared.background_done(done, everyone=True)
            cta.put(operands[0], np.ones(cta.threads, np.bool_), mask)
        else:
            raise Fault("it is not known")

    return run


def _cells(lane: Any, column: Any) -> Cells:
    lanes, columns = np.broadcast_arrays(lane, column)
    return lanes.astype(np.int64), columns.astype(np.int64)


def _move(instruction: Instruction) -> Run:
    """Per warp: a lane per thread ("32x32b"), or 16 lanes, with columns from `split` on for threads 16 to 31."""
    words, load = instruction.opcode, instruction.opcode[1] == "ld"
    address, vector, *split = instruction.operands
    if load:
        address, vector = vector, address
    elif split:
        vector, split = split[0], [vector]
    registers = registers_of(vector)
    if words[4] not in ("32x32b", "16x32bx2") or words[-1] != "b32":
        raise instruction.fault("this access is not known")

    def run(cta: Cta, mask: Any) -> None:
        if mask is not None:
            raise Fault("some threads take no part")
        start = cta.shared_addresses(address)
        thread = np.arange(cta.threads) % 32
        lane, column = (start >> 16) + thread, start & 0xFFFF
        if ((start >> 21) != np.arange(cta.threads) // 32 % 4).any():
            raise Fault("a warp reaches for lanes of another")
        if split:
            lane = lane - thread // 16 * 16
            column = column + thread // 16 * int(cta.get(split[0], np.uint32)[0])
        cells = _cells(lane[:, None], column[:, None] + np.arange(len(registers)))
        if load:
            values = cta.tensor_memory.load(cells)
            for number, register in enumerate(registers):
                cta.put(register, np.ascontiguousarray(values[:, number]), None)
            cta.load_runs(registers)
        else:
            cta.tensor_memory.store(cells, np.stack([cta.get(register, np.uint32) for register in registers], 1))

    return run


def _product(instruction: Instruction) -> Run:
    """D (M, N) += A (M, 16) x B (16, N), of one thread; D in tensor memory, A there or in shared memory, B there.

    PTX ISA, "Instruction descriptor" for .kind::f16: bits 4-5 type of D (1: float32), 7-12 of A and B (0: float16),
    13-14 signs, 15-16 transposes, 17-22 N / 8, 24-28 M / 16. "Data path layout": 128 rows are the lanes, 64
    rows the first 16 of every 32 lanes.
    """
    target, left, right, what, keep = instruction.operands

    def run(cta: Cta, mask: Any) -> None:
        if mask is None or mask.sum() != 1:
            raise Fault("a product is for one thread to start")
        memory, described_by = cta.tensor_memory, cta.first(what, mask)
        if described_by & 0xFF80FFFF & ~(0x1F << 24) & ~0x8010 != 0 or described_by >> 4 & 3 != 1:
            raise Fault("a product with this description is not known")
        columns, rows = (described_by >> 17 & 63) * 8, (described_by >> 24 & 31) * 16
        lanes = np.arange(128) if rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
        if isinstance(left, Address):
            at = cta.first(left, mask)
            cells = _cells((at >> 16) + lanes[:, None], (at & 0xFFFF) + np.arange(8))
            a = memory.operand(cells).view(np.float16).astype(np.float32)
        else:
            a = described(cta, cta.first(left, mask), rows, transposed=bool(described_by >> 15 & 1), blackwell=True)
        b = described(cta, cta.first(right, mask), columns, transposed=bool(described_by >> 16 & 1), blackwell=True)
        at = cta.first(target, mask)
        cells = _cells((at >> 16) + lanes[:, None], (at & 0xFFFF) + np.arange(columns))
        memory.accumulate(cells, a @ b.T, keep=bool(np.broadcast_to(cta.get(keep, np.bool_), cta.threads)[mask][0]))

    return run
