"""What a model family is: how to recognise its checkpoints and build its step model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["Family", "NotThisFamily", "identity"]

Tensors = Mapping[str, Tensor]


class NotThisFamily(Exception):
    """Why a checkpoint is not of a family; listed when no family fits."""


def nothing(_: Mapping[str, Sequence[int]], __: Mapping[str, object]) -> dict[str, object]:
    """For families whose tensors determine every size."""
    return {}


def identity(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    """For families whose checkpoints hold the canonical module's own names."""
    return dict(tensors)


@dataclass(frozen=True)
class Family:
    """One family of recurrent vision models.

    Attributes:
        name: what `--family` takes.
        summary: one line for `--list-families`.
        arguments: keys that `--set` takes, each with its meaning.
        recognise: arguments inferred from names and shapes of tensors; raises NotThisFamily.
        build: the canonical step model for these arguments.
        convert: state_dict of the canonical model from the checkpoint's tensors.
        from_shapes: arguments that follow from shapes of data inputs (`--shape`), given the others; only
            what the tensors do not determine.
        by_name: taken only with `--family`, since its checkpoints are those of another family too.
    """

    name: str
    summary: str
    recognise: Callable[[Tensors], dict[str, object]]
    build: Callable[..., nn.Module]
    convert: Callable[[Tensors, Mapping[str, object]], dict[str, Tensor]] = identity
    arguments: Mapping[str, str] = field(default_factory=dict)
    from_shapes: Callable[[Mapping[str, Sequence[int]], Mapping[str, object]], dict[str, object]] = nothing
    by_name: bool = False
