"""Adapters for cells of your own: name the gates, the order of the concatenation, the update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from stepcell.errors import ExportError
from stepcell.exporter.from_module.gates import Term, gru_cell, lstm_cell
from stepcell.models.cells import ConvGRUCell, ConvLSTMCell, Gates, Reset

__all__ = ["Cell", "adapter_for", "register_cell"]

Cell = ConvGRUCell | ConvLSTMCell
Convert = Callable[[nn.Module], Cell]

_ADAPTERS: dict[type[nn.Module], Convert] = {}
_LETTERS = {"ConvGRU": "zrn", "ConvLSTM": "ifog"}


def register_cell(
    cell: type[nn.Module],
    convert: Callable[[nn.Module], Cell] | None = None,
    *,
    op: Literal["ConvGRU", "ConvLSTM"] = "ConvGRU",
    gates: Mapping[str, str | tuple[str, str]] | None = None,
    concat: Literal["xh", "hx"] = "xh",
    update: Literal["takes", "keeps"] = "takes",
    reset: Reset = "before",
    activations: Gates = "soft",
) -> None:
    """Say how a cell class maps to the canonical one; `stepcell export --module` then replaces its instances.

    The result is compared with the cell itself before it is used, so a wrong adapter is an error.

    Args:
        cell: the class; instances of subclasses are not meant.
        convert: a function from an instance to a `stepcell.models` cell with its weights, in place
            of all that follows.
        op: "ConvGRU" or "ConvLSTM".
        gates: which convolution (or linear layer) gives which gates, by its path in the cell:
            {"zr": "conv_gates", "n": "conv_new"} packs z before r in the outputs of `conv_gates`.
            A pair of paths is one layer over x and one over h, added. Letters: z, r, n or i, f, o, g.
        concat: order of x and h in the inputs of a convolution over both.
        update: "takes": h' = (1 - z) h + z n, "keeps": h' = z h + (1 - z) n.
        reset: "before" the hidden convolution of the candidate, or "after" it (a pair of paths then).
        activations: "soft" or "hard" gates, as in `stepcell.models.ConvGRUCell`.

    Raises:
        ExportError: the gates are not those of the op, each once.
    """
    if convert is not None:
        _ADAPTERS[cell] = convert
        return
    named = dict(gates or {})
    if sorted("".join(named)) != sorted(_LETTERS[op]):
        raise ExportError(
            f"register_cell({cell.__name__}): gates: expected each of {', '.join(_LETTERS[op])} once, "
            f"got {', '.join(named) or 'none'}"
        )

    def from_gates(module: nn.Module) -> Cell:
        terms = {letter: term for key, path in named.items() for letter, term in _terms(module, key, path, concat)}
        if op == "ConvLSTM":
            return lstm_cell(*(terms[letter] for letter in "ifog"), gates=activations)
        return gru_cell(
            *(terms[letter] for letter in "zrn"), reset=reset, keeps_old=update == "keeps", gates=activations
        )

    _ADAPTERS[cell] = from_gates


def adapter_for(module: nn.Module) -> Convert | None:
    """The adapter registered for the class of `module`."""
    return _ADAPTERS.get(type(module))


def _terms(module: nn.Module, letters: str, path: str | tuple[str, str], concat: str) -> list[tuple[str, list[Term]]]:
    """The terms of each gate packed in a convolution, or in a pair over x and over h."""
    if isinstance(path, tuple):
        (over_x, bias_x), (over_h, bias_h) = (_layer(module, each) for each in path)
        pairs = zip(
            _rows(over_x, letters), _rows(bias_x, letters), _rows(over_h, letters), _rows(bias_h, letters), strict=True
        )
        return [
            (letter, [Term(x, None, b_x), Term(None, h, b_h)])
            for letter, (x, b_x, h, b_h) in zip(letters, pairs, strict=True)
        ]
    weight, bias = _layer(module, path)
    hidden = weight.shape[0] // len(letters)
    inputs = weight.shape[1] - hidden
    found = []
    for letter, rows, b in zip(letters, _rows(weight, letters), _rows(bias, letters), strict=True):
        assert rows is not None
        x, h = (rows[:, :inputs], rows[:, inputs:]) if concat == "xh" else (rows[:, hidden:], rows[:, :hidden])
        found.append((letter, [Term(x, h, b)]))
    return found


def _layer(module: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    try:
        layer = module.get_submodule(path)
    except AttributeError as error:
        raise ExportError(f"register_cell({type(module).__name__}): the cell has no layer {path!r}") from error
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 4):
        raise ExportError(f"register_cell({type(module).__name__}): {path!r} is no 2-D convolution or linear layer")
    return (weight if weight.dim() == 4 else weight[:, :, None, None]), bias


def _rows(tensor: Tensor | None, letters: str) -> list[Tensor | None]:
    return [None] * len(letters) if tensor is None else list(torch.chunk(tensor, len(letters)))
