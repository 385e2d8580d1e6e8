"""One program (thread block): registers, control flow and background work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from tools.ptx_emulator.access import access
from tools.ptx_emulator.memory import Memory
from tools.ptx_emulator.program import Address, Fault, Immediate, Instruction, Operand, Program, Register
from tools.ptx_emulator.scalar import TYPES, Run, scalar
from tools.ptx_emulator.shared import BASE, Shared
from tools.ptx_emulator.tensor_core import tensor_core
from tools.ptx_emulator.tensor_memory import TensorMemory, tensor_memory

__all__ = ["Code", "Cta"]

Array = NDArray[Any]
_CONTAINERS: dict[str, Any] = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}


class Code:
    """A parsed kernel with one function per instruction."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = [_runner(instruction) for instruction in program.instructions]

    @cached_property
    def meetings(self) -> dict[int, int]:
        """Where threads that diverge at a branch reconverge: its immediate post-dominator."""
        graph, instructions = nx.DiGraph(), self.program.instructions
        for at, instruction in enumerate(instructions):
            branches = instruction.opcode[0] == "bra"
            if branches:
                graph.add_edge(self.program.labels[str(instruction.operands[0])], at)
            if not branches or instruction.guard is not None:
                graph.add_edge(at + 1, at)
        return dict(nx.immediate_dominators(graph, len(instructions)))


def _runner(instruction: Instruction) -> Run | None:
    """The function of an instruction; None: control flow, which `Cta.run` handles."""
    name = instruction.opcode[0]
    if name in ("bra", "ret", "griddepcontrol"):
        return None
    run = scalar(instruction) or tensor_core(instruction) or tensor_memory(instruction) or access(instruction)
    if run is None:
        raise instruction.fault("the emulator does not know it")
    return run


class Cta:
    """Runs one program of a launch.

    Args:
        number: number of the program in its launch, from 1.
        places: values of %ctaid and %nctaid.
        arguments: the argument block.
    """

    def __init__(
        self,
        code: Code,
        memory: Memory,
        shared_bytes: int,
        number: int,
        places: tuple[tuple[int, int, int], tuple[int, int, int]],
        arguments: bytes,
    ) -> None:
        self.code, self.memory, self.number = code, memory, number
        self.threads = code.program.threads
        self.shared, self.tensor_memory = Shared(shared_bytes), TensorMemory()
        self.acquired = False  # an atomic of this program has seen others, and a barrier followed
        self._sees = False
        self._stored: set[int] = set()  # warps that wrote to global memory since the last barrier
        self._registers: dict[str, Array] = {}
        self._running: dict[str, int] = {}  # result registers of background products -> group
        self._operands: dict[str, int] = {}  # operand registers of background products -> group
        self._loading: set[str] = set()  # results of loads from tensor memory
        self._groups = 0
        self._arguments = arguments
        self._special: dict[str, Array] = {"%tid.x": np.arange(self.threads, dtype=np.uint32)}
        for name, values in zip(("ctaid", "nctaid"), places, strict=True):
            for axis, value in zip("xyz", values, strict=True):
                self._special[f"%{name}.{axis}"] = np.full(self.threads, value, np.uint32)

    def run(self) -> Iterator[str]:
        """Run to the end; yields at a wait for the previous launch, and where the next launch may start."""
        instructions, steps, labels = self.code.program.instructions, self.code.steps, self.code.program.labels
        at = 0
        active: Any = None  # mask of active threads; None: all
        # Stack of divergent branches: where they reconverge, paths still to run, mask before the branch.
        apart: list[tuple[int, list[tuple[int, Any]], Any]] = []
        while at < len(instructions):
            if apart and apart[-1][0] == at:
                _, others, everyone = apart[-1]
                if others:
                    at, active = others.pop()
                else:
                    active = everyone
                    apart.pop()
                continue
            instruction, step = instructions[at], steps[at]
            at += 1
            try:
                mask = active
                if instruction.guard is not None:
                    mask = self._held(instruction.guard) ^ instruction.negated
                    mask = mask if active is None else mask & active
                    if not mask.any():
                        continue
                    mask = None if mask.all() else mask
                if step is not None:
                    step(self, mask)
                    continue
                if instruction.opcode[0] == "bra":
                    target = labels[str(instruction.operands[0])]
                    if mask is active or (active is not None and (mask == active).all()):
                        at = target
                    else:  # thread 0 goes first, because it starts what others wait for
                        rest = ~mask if active is None else active & ~mask
                        ways = sorted([(target, mask), (at, rest)], key=lambda way: int(way[1].argmax()))
                        apart.append((self.code.meetings[at - 1], ways[1:], active))
                        at, active = ways[0]
                    continue
                if mask is not None:
                    raise Fault("some threads take no part")
                if instruction.opcode[0] == "ret":
                    break
                yield instruction.opcode[1]
            except (AssertionError, ValueError) as error:
                raise instruction.fault(str(error)) from error
        if apart or not (self.shared.idle and self.tensor_memory.idle) or self._running:
            raise Fault("the program ends with copies or products in flight, or tensor memory kept")

    def get(self, operand: Operand, kind: Any, *, running: bool = False) -> Array:
        """Read an operand: one value per thread, or one for all."""
        if isinstance(operand, Register):
            if operand.name in self._loading or (operand.name in self._running and not running):
                raise Fault(f"reads %{operand.name}, which is still written in the background")
            held = self._held(operand.name)
            if np.dtype(kind).itemsize < held.dtype.itemsize:
                held = held.astype(TYPES[f"u{8 * np.dtype(kind).itemsize}"])
            return held.view(kind)
        if isinstance(operand, Immediate):
            bits = np.dtype(kind).itemsize * 8
            unsigned = TYPES[f"u{bits}"]
            if kind is np.bool_:
                return np.full(1, bool(operand.bits))
            return np.full(1, operand.bits & (1 << bits) - 1, np.uint64).astype(unsigned).view(kind)
        if isinstance(operand, str) and operand in self._special:
            return self._special[operand].view(kind)
        if operand == "global_smem":
            return np.full(self.threads, BASE, np.uint32).view(kind)
        raise Fault(f"operand {operand} is not known")

    def _held(self, name: str) -> Array:
        """A register; NaN if it was never written (the compiler reads such registers where the value is unused)."""
        held = self._registers.get(name)
        container = _CONTAINERS[name.rstrip("0123456789")]
        return ~np.zeros(self.threads, container) if held is None else held

    def parts(self, operand: Operand, kind: Any) -> Array:
        """Like `get` for packed registers: the values of a register are adjacent."""
        if not isinstance(operand, Register):
            raise Fault(f"{operand} is not known as several values")
        return self.get(operand, self._held(operand.name).dtype).view(kind)

    def put(self, target: Operand, value: Array, mask: Any) -> None:
        if target == "_":
            return
        assert isinstance(target, Register), target
        if target.name in self._operands:
            raise Fault(f"writes %{target.name}, which a product in the background still reads")
        container = _CONTAINERS[target.name.rstrip("0123456789")]
        value = np.ascontiguousarray(value)
        if value.dtype != container:
            value = value.view(container)
        if len(value) != self.threads:
            value = np.broadcast_to(value, self.threads).copy()
        if mask is not None:
            value = np.where(mask, value, self._held(target.name))
        self._registers[target.name] = value

    def uniform(self, operand: Operand) -> int:
        """A 64-bit value that must be the same in all threads."""
        values = self.get(operand, np.uint64)
        if (values != values[0]).any():
            raise Fault("threads differ in what must be one value")
        return int(values[0])

    def first(self, operand: Operand, mask: Any) -> int:
        """The value of an operand, or an address in shared or tensor memory, in the first active thread."""
        thread = 0 if mask is None else int(mask.argmax())
        if isinstance(operand, Address):
            return int(self.shared_addresses(operand)[thread])
        values = self.get(operand, np.uint64 if self._is_wide(operand) else np.uint32)
        return int(np.broadcast_to(values, self.threads)[thread])

    def _is_wide(self, operand: Operand) -> bool:
        return isinstance(operand, Register) and operand.name.startswith("rd")

    def shared_addresses(self, operand: Operand) -> NDArray[np.int64]:
        return self._addresses(operand, np.uint32)

    def _addresses(self, operand: Operand, kind: Any) -> NDArray[np.int64]:
        assert isinstance(operand, Address)
        base = self.get(operand.base, kind).astype(np.int64)
        return np.broadcast_to(base + operand.offset, self.threads)

    def run_on(self, results: Sequence[Register], operands: Sequence[Register]) -> None:
        """Mark results as unreadable, and operands as not writable, until their products have been waited for."""
        self._running.update((r.name, self._groups) for r in results)
        self._operands.update((r.name, self._groups) for r in operands)

    def products_wait(self, left: int) -> None:
        """Complete all groups of products except the last `left`."""
        first = self._groups - left
        self._running = {name: group for name, group in self._running.items() if group >= first}
        self._operands = {name: group for name, group in self._operands.items() if group >= first}
        self.shared.background_done(first, everyone=False)

    def load_runs(self, results: Sequence[Register]) -> None:
        """Mark results of loads as unreadable until `loads_wait`."""
        self._loading.update(r.name for r in results)

    def loads_wait(self) -> None:
        self._loading.clear()

    def products_commit(self) -> None:
        self._groups += 1

    @property
    def group(self) -> int:
        """Number of the open group of products."""
        return self._groups

    def barrier(self) -> None:
        self.shared.barrier()
        self.tensor_memory.barrier()
        self.acquired |= self._sees
        self._stored.clear()

    def parameter(self, name: str, size: int) -> bytes:
        offset, held = self.code.program.parameters[name]
        if held != size:
            raise Fault(f"parameter {name} has {held} bytes, {size} are read")
        return self._arguments[offset : offset + size]

    def load(self, operand: Operand, size: int, threads: NDArray[np.int64]) -> NDArray[np.uint8]:
        where = self._addresses(operand, np.uint64)[threads].astype(np.uint64)
        return self.memory.read(where, size, self.number, acquired=self.acquired)

    def store(self, operand: Operand, values: NDArray[np.uint8], threads: NDArray[np.int64]) -> None:
        self.memory.write(self._addresses(operand, np.uint64)[threads].astype(np.uint64), values, self.number)
        self._stored |= set(np.unique(threads // 32).tolist())

    def add_atomically(self, operand: Operand, values: Array, threads: NDArray[np.int64]) -> Array:
        """Atomic add; returns the old values. Releases stores of this program and acquires those of others."""
        old = np.zeros(self.threads, np.uint32)
        where = self._addresses(operand, np.uint64).astype(np.uint64)
        for thread in threads.tolist():
            if self._stored - {thread // 32}:
                raise Fault("an atomic releases stores of other warps, with no barrier between")
            at = where[thread : thread + 1]
            before = self.memory.read(at, 4, self.number, acquired=True).view(np.uint32)[:, 0]
            old[thread] = before[0]
            self.memory.write(at, (before + values[thread]).view(np.uint8)[None, :], self.number)
            self._sees = True
        return old
