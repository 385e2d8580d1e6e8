"""Families by name, and how a checkpoint finds its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint
from stepcell.exporter.from_checkpoint.families.canonical import CONV_GRU, CONV_LSTM, DENOISER
from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily
from stepcell.exporter.from_checkpoint.families.torch_rnn import GRU, LSTM

__all__ = ["FAMILIES", "Family", "load_strictly", "step_model"]

# Modules of this package with one published family each, as FAMILY.
_PUBLISHED = (
    "stacks.jacobkimmel_convgru",
    "stacks.mangrick_gru_rcn",
    "openeb.convrnn",
    "heads.pooled_gru_heads",
    "heads.conv2d_lstm_heads",
    "stacks.aserdega_convgru",
    "stacks.aserdega_convlstm",
    "stacks.automan000_peephole_convlstm",
    "e2vid.firenet",
    "e2vid.recurrent",
    "stacks.happyjin_convgru",
    "cells.jhhuang96_convrnn",
    "stacks.ndrplz_convlstm",
    "openeb.event_to_video",
    "openeb.firenet",
    "raft.convgru",
    "raft.sepconvgru",
    "raft.stereo_convgru",
    "raft.update_block",
    "rvm.convgru",
    "rvm.decoder",
    "rvm.full",
    "cells.rvt_dws_convlstm",
    "cells.skillful_convgru",
)
_published = (importlib.import_module(f"{__name__}.{name}").FAMILY for name in _PUBLISHED)
FAMILIES: dict[str, Family] = {
    family.name: family for family in (DENOISER, CONV_GRU, CONV_LSTM, GRU, LSTM, *_published)
}


def step_model(
    checkpoint: Checkpoint,
    family: str | None = None,
    overrides: Mapping[str, object] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[nn.Module, str, dict[str, object]]:
    """Build the canonical step model of a checkpoint and load its weights.

    Args:
        family: a name in FAMILIES; by default what the file says or its tensors show.
        overrides: arguments that go before the inferred ones.
        shapes: of data inputs, where the family needs sizes that the tensors do not determine.

    Returns:
        The module in float32, the family's name and the arguments it was built with.

    Raises:
        UsageError: an unknown family or argument.
        CheckpointError: the tensors do not fit.
    """
    chosen, inferred = _choose(checkpoint, family)
    overrides = dict(overrides or {})
    unknown = sorted(set(overrides) - set(chosen.arguments))
    if unknown:
        raise UsageError(
            f"--set {unknown[0]}: family {chosen.name} has no such argument",
            hint="it takes " + ", ".join(f"{key} ({text})" for key, text in chosen.arguments.items()),
        )
    own = checkpoint.arguments if checkpoint.family == chosen.name else {}
    sized = chosen.from_shapes(shapes or {}, {**inferred, **own, **overrides})
    arguments = {**inferred, **sized, **own, **overrides}
    try:
        model = chosen.build(**arguments)
        # save_checkpoint writes the step model's own tensors, in no need of conversion.
        canonical = checkpoint.family == chosen.name and set(checkpoint.tensors) == set(model.state_dict())
        tensors = checkpoint.tensors if canonical else chosen.convert(_widened(checkpoint.tensors), arguments)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: family {chosen.name} with {arguments}: no {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path}: family {chosen.name} with {arguments}: {error}") from error
    load_strictly(model, tensors, f"{checkpoint.path}: family {chosen.name}")
    return model.float().eval(), chosen.name, arguments


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a norm folded into float16 weights would be rounded to them
    narrow = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in narrow else tensor for name, tensor in tensors.items()}


def _choose(checkpoint: Checkpoint, name: str | None) -> tuple[Family, dict[str, object]]:
    name = name or checkpoint.family
    if name is not None:
        if name not in FAMILIES:
            raise UsageError(f"--family {name}: unknown", hint="families: " + ", ".join(FAMILIES))
        try:
            return FAMILIES[name], FAMILIES[name].recognise(checkpoint.tensors)
        except NotThisFamily as reason:
            if name == checkpoint.family and checkpoint.arguments:  # written by save_checkpoint, which says it all
                return FAMILIES[name], {}
            raise CheckpointError(f"{checkpoint.path}: not a checkpoint of family {name}: {reason}") from reason
    fitting, refused = [], []
    for family in FAMILIES.values():
        if family.by_name:
            continue
        try:
            fitting.append((family, family.recognise(checkpoint.tensors)))
        except NotThisFamily as reason:
            refused.append(f"{family.name}: {reason}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(family.name for family, _ in fitting)
        raise CheckpointError(f"{checkpoint.path}: fits several families: {names}", hint="name one with --family")
    raise CheckpointError(
        f"{checkpoint.path}: of no known family ({'; '.join(refused)})",
        hint="name it with --family, or give your own module with --module package.module:factory",
    )


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], subject: str) -> None:
    """Load weights; raise CheckpointError naming every tensor that is missing, left over or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name} {wanted[name]}" for name in sorted(set(wanted) - set(got))]
    problems += [f"unexpected {name} {got[name]}" for name in sorted(set(got) - set(wanted))]
    problems += [
        f"{name}: expected {wanted[name]}, got {got[name]}"
        for name in sorted(set(wanted) & set(got))
        if wanted[name] != got[name]
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"{subject}: tensors do not fit: {shown}")
    model.load_state_dict(dict(tensors))
