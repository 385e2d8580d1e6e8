"""Parser of PTX: text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Address", "Fault", "Immediate", "Instruction", "Operand", "Program", "Register", "Vector", "parse"]


class Fault(AssertionError):
    """The code breaks a rule, or uses something that the emulator does not implement."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """A number as bits, truncated to the size that it is used with."""

    bits: int


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register or the name of a parameter or of shared memory."""

    base: Register | str
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`; an unused element is the text `_`."""

    items: tuple[Register | Immediate | str, ...]


Operand = Register | Immediate | Address | Vector | str


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        line: in the text, from 1.
        opcode: its parts, such as ("add", "s32").
        operands: in order; labels and special registers are text.
        guard: predicate that it depends on; None: unconditional.
        negated: it executes if the guard is false.
    """

    line: int
    text: str
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False

    def fault(self, reason: str) -> Fault:
        return Fault(f"line {self.line}: {self.text}: {reason}")


@dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        parameters: offset and size of each, by name.
        threads: per program.
        labels: index of the instruction after each label.
    """

    parameters: dict[str, tuple[int, int]]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_NUMBER = re.compile(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?$")
_SCOPE = re.compile(r"\{\s*\.reg \.pred (\w+);\s*(\w+):[^}]*\}")  # a wait loop with local names
_FLOAT = re.compile(r"0f([0-9a-fA-F]{8})$")


def parse(text: str) -> Program:
    """Parse a text with one kernel."""
    parameters: dict[str, tuple[int, int]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    threads = end = 0
    text = _SCOPE.sub(_renamed, text)
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if found := re.match(r"\.param \.u(\d+) .*?(\w+),?$", line):
            size = int(found[1]) // 8
            parameters[found[2]] = (-(-end // size) * size, size)
            end = sum(parameters[found[2]])
        elif found := re.match(r"\.reqntid (\d+)", line):
            threads = int(found[1])
        elif found := re.match(r"(\$\w+):$", line):
            labels[found[1]] = len(instructions)
        elif line.endswith(";") and not line.startswith("."):
            instructions.append(_instruction(number, line[:-1].strip()))
    if not (parameters and instructions and threads):
        raise Fault("the text is not one kernel as Triton writes it")
    return Program(parameters, threads, tuple(instructions), labels)


def _renamed(found: re.Match[str]) -> str:
    """Inline a scope, with unique names for its predicate and label."""
    predicate, label, where = found[1], found[2], found.start()
    body = re.sub(rf"\b{label}\b", f"$scope{where}", found[0])
    body = re.sub(rf"@!{predicate}\b", f"@!%p9{where}", body)
    return re.sub(rf"\b{predicate},", f"%p9{where},", body).replace("{", " ").replace("}", " ")


def _instruction(number: int, text: str) -> Instruction:
    text = " ".join(text.split())
    found = re.match(r"(?:@(!?)%(p\d+) )?([a-zA-Z][\w.:]*) ?(.*)$", text)
    if found is None:
        raise Fault(f"line {number}: cannot read {text!r}")
    operands = [] if not found[4] else re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    opcode = tuple(found[3].replace("::", ".").split("."))
    return Instruction(number, text, opcode, tuple(_operand(o.strip()) for o in operands), found[2], found[1] == "!")


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        items = [_operand(item.strip()) for item in text[1:-1].split(",")]
        return Vector(tuple(item for item in items if isinstance(item, Register | Immediate | str)))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(Register(base[1:]) if base.startswith("%") else base, int(offset or "0", 0))
    if re.match(r"%(?:p|r|rs|rd)\d+$", text):
        return Register(text[1:])
    if found := _NUMBER.match(text):
        return Immediate(int(found[1], 0))
    if found := _FLOAT.match(text):
        return Immediate(int(found[1], 16))
    return text
