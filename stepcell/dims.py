"""Symbolic dimensions: numbers or expressions of symbols, such as `3`, `"height"` and `"height // 4"`.

The size of a state follows from the sizes of the inputs, so a contract gives it as an expression. Expressions come from
files: they are parsed into a syntax tree in which only integers, names and + - * // are accepted, and never evaluated
by Python.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from stepcell.errors import ContractError, InputError

__all__ = ["LARGEST", "Dim", "bind", "check_dim", "evaluate", "resolve", "substitute", "symbols_of"]

Dim = int | str

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_MAX_EXPRESSION = 100  # characters
LARGEST = (1 << 31) - 1  # size of an axis
_SCALED = re.compile(r"([^\W\d]\w*) \* (\d{1,4}) // (\d{1,4})")  # "height * 3 // 2"


class _DivisionByZero(ContractError):
    pass


def _parse(expression: str) -> ast.expr:
    if len(expression) > _MAX_EXPRESSION:
        raise ContractError(f"dimension {expression[:40]!r}...: longer than {_MAX_EXPRESSION} characters")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ContractError(f"dimension {expression!r}: not an expression of + - * // and symbols") from error


def _value(node: ast.expr, expression: str, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in symbols:
            known = ", ".join(sorted(symbols)) or "none"
            raise ContractError(f"dimension {expression!r}: symbol {node.id!r} has no value (known: {known})")
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _value(node.left, expression, symbols)
        right = _value(node.right, expression, symbols)
        if isinstance(node.op, ast.FloorDiv) and right == 0:
            raise _DivisionByZero(f"dimension {expression!r}: division by zero")
        return _OPERATORS[type(node.op)](left, right)
    raise ContractError(f"dimension {expression!r}: only integers, symbols and + - * // are allowed")


def check_dim(dim: Dim) -> None:
    """Raise ContractError unless a dimension is a size of 1 to `LARGEST`, or an expression that can be evaluated."""
    if isinstance(dim, str):
        tree = _parse(dim)
        symbols = {node.id: 1 << 10 for node in ast.walk(tree) if isinstance(node, ast.Name)}
        with contextlib.suppress(_DivisionByZero):  # it depends on the sizes
            _value(tree, dim, symbols)
    elif not 1 <= dim <= LARGEST:
        raise ContractError(f"dimension {dim}: expected 1 to {LARGEST}")


def evaluate(dim: Dim, symbols: Mapping[str, int]) -> int:
    """Value of one dimension, given a value for each symbol."""
    return dim if isinstance(dim, int) else _value(_parse(dim), dim, symbols)


def resolve(shape: Sequence[Dim], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Concrete shape, given a value for each symbol."""
    return tuple(evaluate(dim, symbols) for dim in shape)


def symbols_of(dims: Iterable[Dim]) -> list[str]:
    """Names of the symbols in `dims`, each once, in order of appearance."""
    found: dict[str, None] = {}
    for dim in dims:
        if isinstance(dim, str):
            names = [node for node in ast.walk(_parse(dim)) if isinstance(node, ast.Name)]
            found.update((node.id, None) for node in sorted(names, key=lambda node: node.col_offset))
    return list(found)


def substitute(shape: Sequence[Dim], symbols: Mapping[str, int]) -> tuple[Dim, ...]:
    """Replace each dimension whose symbols all have a value by its number, and keep the others."""
    return tuple(evaluate(d, symbols) if set(symbols_of([d])) <= set(symbols) else d for d in shape)


def bind(tensors: Iterable[tuple[str, Sequence[Dim], Sequence[int]]]) -> dict[str, int]:
    """Values of the symbols for which every declared shape equals the actual one, in any order of the tensors.

    Args:
        tensors: name (for messages), declared shape and actual shape of each. A dimension that is a single symbol
            determines it, and so does `height * 3 // 2`, which has another value for every height. Other expressions,
            such as `height // 2`, are compared afterwards.

    Raises:
        InputError: a rank, a fixed dimension or an expression does not fit, or no tensor determines a symbol.
    """
    given = list(tensors)
    symbols: dict[str, int] = {}
    for name, shape, actual in given:
        if len(shape) != len(actual) or any(size < 1 for size in actual):
            raise _misfit(name, shape, actual, symbols)
        for dim, size in zip(shape, actual, strict=True):
            if isinstance(dim, str) and dim.isidentifier() and symbols.setdefault(dim, size) != size:
                raise _misfit(name, shape, actual, symbols)
    for _, shape, actual in given:
        for dim, size in zip(shape, actual, strict=True):
            scaled = _SCALED.fullmatch(dim) if isinstance(dim, str) else None
            if scaled and scaled[1] not in symbols and int(scaled[2]) >= int(scaled[3]) > 0:
                symbols[scaled[1]] = -(-size * int(scaled[3]) // int(scaled[2]))
    for name, shape, actual in given:
        if unknown := [symbol for symbol in symbols_of(shape) if symbol not in symbols]:
            raise InputError(
                f"{name}: its shape {_written(shape)} follows from {unknown[0]}, which has no value",
                hint=f"give the input that has {unknown[0]} as a size of its own, too",
            )
        if resolve(shape, symbols) != tuple(actual):
            raise _misfit(name, shape, actual, symbols)
    return symbols


def _misfit(name: str, shape: Sequence[Dim], actual: Sequence[int], symbols: Mapping[str, int]) -> InputError:
    return InputError(
        f"{name}: expected shape {_written(shape)}, got {tuple(actual)}",
        hint=f"known sizes: {dict(symbols)}" if symbols else None,
    )


def _written(shape: Sequence[Dim]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
