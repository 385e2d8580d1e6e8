"""Step model of a checkpoint: find the family, build the canonical module, convert and load the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.from_checkpoint.choose_family import choose_family
from stepcell.exporter.from_checkpoint.dense_weights import check_finite, dense_weights
from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.part import ask, fitting_parts, lines_of, report, source_of
from stepcell.exporter.from_checkpoint.weight_sets import shape_of
from stepcell.models.checkpoint_writer import set_family
from stepcell.renamed_families import current_name

__all__ = ["FamilyModel", "family_model", "load_model", "load_strictly", "load_weights", "step_model"]

# A step model has about as many values as its checkpoint: more than this is a damaged or hostile file.
_LARGER, _SPARE = 4, 2**20


@dataclass(frozen=True)
class FamilyModel:
    """A step model of a family, with the weights of a checkpoint.

    Attributes:
        model: in float32 and eval mode.
        family: its name.
        arguments: those the model was built with.
        source: where the weights lie in the file, for the contract: `checkpoint_key` and `checkpoint_prefix`, if they
            are not all that the file holds.
    """

    model: nn.Module
    family: str
    arguments: dict[str, object]
    source: dict[str, object]


def load_model(
    checkpoint: str | Path,
    family: str | None = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    **arguments: object,
) -> nn.Module:
    """Load a checkpoint of any family as a torch module, to train it further.

    `run_sequence` steps the module over clips, with gradients; a file written by `save_checkpoint`
    is recognised by `stepcell export` without `--family` and `--set`.

    Args:
        checkpoint: file in upstream's layout or written by `save_checkpoint`.
        family: name of the family; by default it is recognised from the file.
        key: which weights of the file, as for `load_checkpoint`.
        prefix: as for `load_checkpoint`.
        arguments: values that the tensors do not determine, as for `stepcell export --set`.

    Returns:
        The step model that export would trace, in float32 and train mode. Normalisation layers that
        export folds into convolutions are folded here too.

    Raises:
        CheckpointError: the file cannot be read safely or its tensors do not fit.
        UsageError: an unknown family or argument, or several parts of the file fit.
    """
    content = load_checkpoint(checkpoint, key=key, prefix=prefix)
    loaded = family_model(content, family, arguments)
    set_family(loaded.model, loaded.family, loaded.arguments)
    return loaded.model.train()


def step_model(
    checkpoint: Checkpoint,
    family: str | None = None,
    overrides: Mapping[str, object] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[nn.Module, str, dict[str, object]]:
    """Build the step model of a checkpoint and load its weights.

    Args:
        family: name or former name of a family; by default the one the file names or its tensors match.
        overrides: arguments that take precedence over the inferred ones.
        shapes: shapes of data inputs, for families with sizes that the tensors do not determine.

    Returns:
        The module in float32 and eval mode, the family's name and the arguments it was built with.

    Raises:
        UsageError: an unknown family or argument, or several parts of the file fit.
        CheckpointError: the tensors do not fit.
    """
    loaded = family_model(checkpoint, family, overrides, shapes)
    return loaded.model, loaded.family, loaded.arguments


def family_model(
    checkpoint: Checkpoint,
    family: str | None = None,
    overrides: Mapping[str, object] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> FamilyModel:
    """As `step_model`, with the place of the weights in the file."""
    chosen, inferred, part = choose_family(checkpoint, family)
    saved_as_this = current_name(checkpoint.family or "") == chosen.name
    overrides = dict(overrides or {})
    _check_names(overrides, chosen)
    tensors = dense_weights(part.tensors, str(checkpoint.path))
    saved = checkpoint.arguments if saved_as_this else {}
    subject = f"{checkpoint.path}: family {chosen.name}"
    arguments = {**inferred, **saved, **overrides}
    try:
        sized = chosen.from_shapes(shapes or {}, arguments)
        arguments = {**inferred, **sized, **saved, **overrides}
        effective = {key: value for key, value in arguments.items() if key not in chosen.ignored}
        _check_size(chosen, effective, tensors)
        model = chosen.build(**effective)
        # A file written by save_checkpoint holds the step model's own tensors and needs no conversion.
        canonical = saved_as_this and set(tensors) == set(model.state_dict())
        converted = tensors if canonical else chosen.convert(_widened(tensors), effective)
    except KeyError as error:
        raise CheckpointError(f"{subject} with {arguments}: no {error}") from error
    except (NotThisFamily, ArithmeticError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{subject} with {arguments}: {' '.join(str(error).split())}") from error
    load_strictly(model, converted, subject)
    check_finite(model.state_dict(), f"{subject}: after conversion")
    return FamilyModel(model.float().eval(), chosen.name, arguments, source_of(part))


def load_weights(model: nn.Module, checkpoint: Checkpoint, what: str) -> dict[str, object]:
    """Load a checkpoint into a module of the user, from the part of the file that has its names.

    Args:
        what: the module, for messages.

    Returns:
        Where the weights lie in the file, as in `FamilyModel.source`.

    Raises:
        CheckpointError: no part has the module's tensors; the message compares with the one that comes closest.
        UsageError: several parts have them; the hint has the options that choose one.
    """
    wanted = model.state_dict()
    closest: dict[str, Tensor] = {}

    def matches(tensors: Tensors) -> None:
        nonlocal closest
        if tensors.keys() != wanted.keys():
            if len(tensors.keys() & wanted.keys()) > len(closest.keys() & wanted.keys()) or not closest:
                closest = dict(tensors)
            raise NotThisFamily("other tensors")

    subject = f"{checkpoint.path}: {what}"
    parts, misses = fitting_parts(checkpoint, matches)
    if not parts:
        load_strictly(model, closest, subject)
    if len(parts) > 1:
        raise ask(checkpoint, f"{len(parts)} sets of weights in it fit {what}", lines_of(parts, [None] * len(parts)))
    [part] = parts
    tensors = dense_weights(part.tensors, str(checkpoint.path), like=wanted)
    report(checkpoint, part, what, misses)
    load_strictly(model, tensors, subject)
    return source_of(part)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], subject: str) -> None:
    """Load weights that must match the module's state_dict in names and shapes.

    Args:
        subject: start of the error message.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: shape_of(tensor) for name, tensor in tensors.items()}
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


def _check_size(family: Family, arguments: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the model would be much larger than the checkpoint; nothing is allocated."""
    with torch.device("meta"):
        needed = sum(tensor.numel() for tensor in family.build(**arguments).state_dict().values())
    got = sum(tensor.numel() for tensor in tensors.values())
    if needed > _LARGER * got + _SPARE:
        raise ValueError(f"a model of these sizes has {needed:,} values, the checkpoint {got:,}")


def _check_names(overrides: Mapping[str, object], family: Family) -> None:
    if unknown := sorted(set(overrides) - set(family.settings)):
        ignored = f"; it ignores {', '.join(family.ignored)}" if family.ignored else ""
        raise UsageError(
            f"--set {unknown[0]}: family {family.name} has no such argument",
            hint="it takes " + ", ".join(f"{key} ({text})" for key, text in family.arguments.items()) + ignored,
        )


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Folding a normalisation layer into float16 weights would round the result to float16.
    narrow = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in narrow else tensor for name, tensor in tensors.items()}
