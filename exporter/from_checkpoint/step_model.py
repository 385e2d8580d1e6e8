"""Step model of a checkpoint: find the family, build the canonical module, convert and load the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint, load_checkpoint
from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily
from stepcell.exporter.from_checkpoint.families.registry import FAMILIES, find_family
from stepcell.models.checkpoint_writer import set_family
from stepcell.renamed_families import current_name

__all__ = ["load_model", "load_strictly", "step_model"]


def load_model(checkpoint: str | Path, family: str | None = None, **arguments: object) -> nn.Module:
    """Load a checkpoint of any family as a torch module, to train it further.

    `run_sequence` steps the module over clips, with gradients; a file written by `save_checkpoint`
    is recognised by `stepcell export` without `--family` and `--set`.

    Args:
        checkpoint: file in upstream's layout or written by `save_checkpoint`.
        family: name of the family; by default it is recognised from the file.
        arguments: values that the tensors do not determine, as for `stepcell export --set`.

    Returns:
        The step model that export would trace, in float32 and train mode. Normalisation layers that
        export folds into convolutions are folded here too.

    Raises:
        CheckpointError: the file cannot be read safely or its tensors do not fit.
        UsageError: an unknown family or argument.
    """
    model, name, used = step_model(load_checkpoint(Path(checkpoint)), family, arguments)
    set_family(model, name, used)
    return model.train()


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
        UsageError: an unknown family or argument.
        CheckpointError: the tensors do not fit.
    """
    chosen, inferred = _choose(checkpoint, family)
    saved_as_this = current_name(checkpoint.family or "") == chosen.name
    overrides = dict(overrides or {})
    _check_names(overrides, chosen)
    saved = checkpoint.arguments if saved_as_this else {}
    sized = chosen.from_shapes(shapes or {}, {**inferred, **saved, **overrides})
    arguments = {**inferred, **sized, **saved, **overrides}
    effective = {key: value for key, value in arguments.items() if key not in chosen.ignored}
    try:
        model = chosen.build(**effective)
        # A file written by save_checkpoint holds the step model's own tensors and needs no conversion.
        canonical = saved_as_this and set(checkpoint.tensors) == set(model.state_dict())
        tensors = checkpoint.tensors if canonical else chosen.convert(_widened(checkpoint.tensors), effective)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: family {chosen.name} with {arguments}: no {error}") from error
    except (NotThisFamily, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path}: family {chosen.name} with {arguments}: {error}") from error
    load_strictly(model, tensors, f"{checkpoint.path}: family {chosen.name}")
    return model.float().eval(), chosen.name, arguments


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], subject: str) -> None:
    """Load weights that must match the module's state_dict in names and shapes.

    Args:
        subject: start of the error message.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected or of another shape.
    """
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


def _choose(checkpoint: Checkpoint, name: str | None) -> tuple[Family, dict[str, object]]:
    name = name or checkpoint.family
    if name is None:
        return _recognise(checkpoint)
    family = find_family(name)
    try:
        return family, family.infer(checkpoint.tensors)
    except NotThisFamily as reason:
        if name == checkpoint.family and checkpoint.arguments:  # save_checkpoint stored every argument
            return family, {}
        raise CheckpointError(f"{checkpoint.path}: not a checkpoint of family {family.name}: {reason}") from reason


def _recognise(checkpoint: Checkpoint) -> tuple[Family, dict[str, object]]:
    matching, refused = [], []
    for family in FAMILIES.values():
        if family.by_name:
            continue
        try:
            matching.append((family, family.infer(checkpoint.tensors)))
        except NotThisFamily as reason:
            refused.append(f"{family.name}: {reason}")
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(family.name for family, _ in matching)
        raise CheckpointError(f"{checkpoint.path}: matches several families: {names}", hint="name one with --family")
    raise CheckpointError(
        f"{checkpoint.path}: matches no known model family ({'; '.join(refused)})",
        hint="name it with --family, or give your own module with --module package.module:factory",
    )


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
