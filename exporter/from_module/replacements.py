"""Replacement of modules before tracing: recurrent layers of torch, parametrized weights, registered cells.

A replacement computes the same and is called in the same way. The model with its replacements is
compared with the original one, so a wrong one is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from stepcell.errors import ExportError

__all__ = ["UnrolledRNN", "register_cell", "replace_modules"]

_LAYERS: dict[type[nn.RNNBase], type[nn.RNNCellBase]] = {
    nn.GRU: nn.GRUCell,
    nn.LSTM: nn.LSTMCell,
    nn.RNN: nn.RNNCell,
}
_LONGEST = 16  # frames of a sequence inside the step
_registered: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def register_cell(cell: type[nn.Module], convert: Callable[[Any], nn.Module]) -> None:
    """Replace modules of a class before `stepcell export --module` traces the network.

    For a cell whose convolutions are not visible in the graph: an extension in C++, `unfold`, `einsum`.
    The replacement computes them with `torch.nn.Conv2d` or `torch.nn.Linear`, in whatever order of
    gates, and is recognised like any other cell.

    Args:
        cell: the class; instances of subclasses are not replaced.
        convert: called with each instance after a checkpoint was loaded; returns a module that takes
            and returns the same, with the weights of the instance. Attributes in which the instance
            keeps states must exist in it.
    """
    _registered[cell] = convert


def replace_modules(module: nn.Module) -> nn.Module:
    """Replace registered cells and torch's recurrent layers, and make parametrized weights plain.

    Args:
        module: in eval mode and float64; it is changed.

    Returns:
        The module, or its replacement where it is itself such a layer.

    Raises:
        ExportError: a registered conversion returns no module.
    """
    replacements: dict[nn.Module, nn.Module] = {}  # a module under two names stays one module
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if child not in replacements:
            replacements[child] = _replacement(child)
        if replacements[child] is child:
            continue
        if not path:
            module = replacements[child]
            break
        module.set_submodule(path, replacements[child])
    for child in module.modules():
        _make_weights_plain(child)
    return module.eval()


def _replacement(module: nn.Module) -> nn.Module:
    convert = _registered.get(type(module))
    if convert is not None:
        new = convert(module)
        if not isinstance(new, nn.Module):
            raise ExportError(
                f"register_cell({type(module).__name__}): expected a torch module from convert, "
                f"got {type(new).__name__}"
            )
        return new.double()
    if isinstance(module, nn.RNNBase) and type(module) in _LAYERS:
        return UnrolledRNN(module)
    return module


def _make_weights_plain(module: nn.Module) -> None:
    """Compute weights that a parametrization (spectral norm, weight norm) computes at every call once."""
    if parametrize.is_parametrized(module):
        # torch's remove_parametrizations changes the class, which copies of a module share
        weights = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        del module.parametrizations
        module.__class__ = parametrize.type_before_parametrizations(module)
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight.detach()))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


class UnrolledRNN(nn.Module):
    """A `torch.nn.GRU`, `LSTM` or `RNN` as single cells, since a step graph has no loop operator.

    Input (T, N, F), or (N, T, F) with `batch_first`; states (layers, N, C); as the layer takes and returns them. A
    bidirectional layer may run over an axis inside a frame, without states between frames.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.batch_first, self.num_layers = rnn.batch_first, rnn.num_layers
        self.input_size, self.hidden_size = rnn.input_size, rnn.hidden_size
        self.is_lstm = isinstance(rnn, nn.LSTM)
        self.output_size = rnn.proj_size or rnn.hidden_size
        self.directions = 2 if rnn.bidirectional else 1
        options: dict[str, Any] = {"nonlinearity": rnn.nonlinearity} if isinstance(rnn, nn.RNN) else {}
        self.cells = nn.ModuleList()  # forward and backward cell of each layer in turn
        for layer in range(rnn.num_layers):
            size = rnn.input_size if layer == 0 else self.output_size * self.directions
            for suffix in ("", "_reverse")[: self.directions]:
                if rnn.proj_size:
                    cell: nn.Module = ProjectedLSTMCell(rnn, f"_l{layer}{suffix}")
                else:
                    cell = _LAYERS[type(rnn)](size, rnn.hidden_size, rnn.bias, **options)
                    names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if rnn.bias else ()))
                    for name in names:
                        setattr(cell, name, getattr(rnn, f"{name}_l{layer}{suffix}"))
                self.cells.append(cell)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        time = 1 if self.batch_first else 0
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise RuntimeError("a recurrent layer takes a batch of sequences with three axes here")
        if input.shape[time] > _LONGEST:
            raise RuntimeError(
                f"a recurrent layer runs over a sequence of {input.shape[time]} inside the step, more than {_LONGEST}"
            )
        if hx is None:
            count, batch = len(self.cells), input.shape[1 - time]
            h = input.new_zeros(count, batch, self.output_size)
            hx = (h, input.new_zeros(count, batch, self.hidden_size)) if self.is_lstm else h
        states: list[Any] = list(zip(*hx, strict=True)) if self.is_lstm else list(hx)
        frames = list(input.unbind(time))
        for layer in range(self.num_layers):
            ways = []
            for index in range(layer * self.directions, (layer + 1) * self.directions):
                backwards = index % self.directions == 1
                outputs = []
                for x in reversed(frames) if backwards else frames:
                    states[index] = self.cells[index](x, states[index])
                    outputs.append(states[index][0] if self.is_lstm else states[index])
                ways.append(outputs[::-1] if backwards else outputs)
            frames = [torch.cat(both, -1) if len(both) > 1 else both[0] for both in zip(*ways, strict=True)]
        stacked = tuple(map(torch.stack, zip(*states, strict=True))) if self.is_lstm else torch.stack(states)
        return torch.stack(frames, time), stacked


class ProjectedLSTMCell(nn.Module):
    """One layer of `torch.nn.LSTM(proj_size=...)`: h is a projection of the LSTM's output, and what it reads back.

    Takes x (N, F) and (h (N, P), c (N, C)) and returns the new (h, c). Source of the equations: torch.nn.LSTM.
    """

    def __init__(self, rnn: nn.RNNBase, suffix: str) -> None:
        super().__init__()
        self.weight_ih, self.weight_hh = getattr(rnn, f"weight_ih{suffix}"), getattr(rnn, f"weight_hh{suffix}")
        self.weight_hr = getattr(rnn, f"weight_hr{suffix}")
        self.bias_ih = getattr(rnn, f"bias_ih{suffix}") if rnn.bias else None
        self.bias_hh = getattr(rnn, f"bias_hh{suffix}") if rnn.bias else None

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        gates = functional.linear(x, self.weight_ih, self.bias_ih) + functional.linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return functional.linear(torch.sigmoid(o) * torch.tanh(c), self.weight_hr), c
