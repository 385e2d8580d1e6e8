"""Conversion of published cells' weights to those of the canonical cells, without rounding.

A gate is a convolution over a concatenation of x and h: weight (C, Cx + C, kh, kw) and bias (C) or
None. `blocks` splits a packed convolution into such gates, in upstream's order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Gate", "bias_of", "blocks", "fold_norm", "gate", "gru_tensors", "lstm_tensors", "prefixed", "under"]

Gate = tuple[Tensor, Tensor | None]


def gate(tensors: Mapping[str, Tensor], name: str, *, biased: bool = False) -> Gate:
    """Convolution `name` of a state_dict: `name.weight` and, if there is one, `name.bias`.

    Args:
        biased: whether upstream always has a bias: KeyError if there is none.
    """
    return tensors[f"{name}.weight"], tensors[f"{name}.bias"] if biased else tensors.get(f"{name}.bias")


def blocks(packed: Gate, count: int) -> list[Gate]:
    """Split a convolution into `count` gates, packed along its output channels."""
    weight, bias = packed
    biases = bias.chunk(count) if bias is not None else [None] * count
    return list(zip(weight.chunk(count), biases, strict=True))


def bias_of(conv: Gate) -> Tensor:
    """The bias of a convolution, or zeros."""
    weight, bias = conv
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def gru_tensors(z: Gate, r: Gate, n: Gate, *, x_first: bool = True, keeps_old: bool = False) -> dict[str, Tensor]:
    """Tensors of a `ConvGRUCell` with reset "before".

    Args:
        z, r, n: update gate, reset gate, candidate; the candidate's hidden part sees r . h.
        x_first: whether x comes before h in the concatenation.
        keeps_old: whether upstream computes h' = z . h + (1 - z) . n. The update gate is then negated:
            1 - sigmoid(a) = sigmoid(-a).
    """
    sign = -1 if keeps_old else 1
    halves = [_halves(weight, x_first) for weight, _ in (z, r, n)]
    (z_x, z_h), (r_x, r_h), (n_x, n_h) = halves
    return {
        "weight_x": torch.cat([sign * z_x, r_x, n_x]),
        "weight_h": torch.cat([sign * z_h, r_h]),
        "weight_n": n_h.clone(),
        "bias": torch.cat([sign * bias_of(z), bias_of(r), bias_of(n)]),
    }


def lstm_tensors(i: Gate, f: Gate, o: Gate, g: Gate, *, x_first: bool = True) -> dict[str, Tensor]:
    """Tensors of a `ConvLSTMCell`: input, forget and output gate, candidate."""
    halves = [_halves(weight, x_first) for weight, _ in (i, f, o, g)]
    return {
        "weight_x": torch.cat([x for x, _ in halves]),
        "weight_h": torch.cat([h for _, h in halves]),
        "bias": torch.cat([bias_of(each) for each in (i, f, o, g)]),
    }


def fold_norm(
    conv: Gate, norm: Mapping[str, Tensor], *, eps: float = 1e-5, outputs_axis: int = 0
) -> tuple[Tensor, Tensor]:
    """A convolution and the norm that follows it, in eval mode, as one convolution.

    Args:
        norm: `running_mean` and `running_var`, and `weight` and `bias` if it has them.
        outputs_axis: axis of the output channels in the convolution's weight; 1 in a transposed one.
    """
    weight, mean = conv[0], norm["running_mean"].double()
    # computed in float64, so that the result is rounded once
    scale = torch.rsqrt(norm["running_var"].double() + eps)
    shift = -mean * scale if conv[1] is None else (conv[1].double() - mean) * scale
    if "weight" in norm or "bias" in norm:
        gain = norm["weight"].double()
        scale, shift = scale * gain, shift * gain + norm["bias"].double()
    shape = [-1 if axis == outputs_axis else 1 for axis in range(weight.dim())]
    return (weight.double() * scale.view(shape)).to(weight.dtype), shift.to(weight.dtype)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with `prefix.` added before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _halves(weight: Tensor, x_first: bool) -> tuple[Tensor, Tensor]:
    hidden = weight.shape[0]  # a gate has as many outputs as the state has channels
    inputs = weight.shape[1] - hidden
    if x_first:
        return weight[:, :inputs], weight[:, inputs:]
    return weight[:, hidden:], weight[:, :hidden]
