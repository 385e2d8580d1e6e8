"""Definition of a model family: how to recognise its checkpoints and build its step model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["Family", "NotThisFamily", "Tensors", "check_names", "weight_and_bias"]

Tensors = Mapping[str, Tensor]
_FEW = 10  # one tensor of ten more or less is near


class NotThisFamily(Exception):
    """Reason why a checkpoint does not belong to a family; listed when no family matches.

    Args:
        near: whether it is nevertheless one of this family's files: with a tensor too many or too few, or of a variant
            that is not supported. A smaller family's tensors in it are not taken then.
    """

    def __init__(self, reason: str, *, near: bool = False) -> None:
        super().__init__(reason)
        self.near = near


def check_names(tensors: Tensors, expected: Iterable[str]) -> None:
    """Raise NotThisFamily if the checkpoint has other tensors than these."""
    names = set(expected)
    if differing := sorted(set(tensors) ^ names):
        raise NotThisFamily(
            f"{'unexpected' if differing[0] in tensors else 'no'} tensor {differing[0]}",
            near=len(differing) <= max(1, len(names) // _FEW),
        )


def weight_and_bias(modules: Iterable[str]) -> set[str]:
    """Names of the weight and the bias of each module."""
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


def _same_tensors(tensors: Tensors, _: Mapping[str, object]) -> dict[str, Tensor]:
    return dict(tensors)


def _no_arguments(_: Mapping[str, Sequence[int]], __: Mapping[str, object]) -> dict[str, object]:
    return {}


@dataclass(frozen=True)
class Family:
    """One family of recurrent vision models.

    Arguments have the names that upstream's constructor gives them.

    Attributes:
        name: value of `--family`.
        summary: one line for `--list-families`.
        recognise: infers arguments from the names and shapes of the tensors; raises NotThisFamily.
        build: makes the step model, with random weights, from the arguments.
        convert: turns the checkpoint's tensors into the step model's state_dict, given the arguments. By
            default the tensors are taken as they are.
        arguments: keys that `--set` takes, each with its meaning.
        ignored: further keys that `--set` takes: arguments of upstream that do not affect a step. They are
            passed neither to `build` nor to `convert`.
        from_shapes: infers arguments that the tensors do not determine from the shapes of the data inputs
            (`--shape`), given the other arguments.
        by_name: only used when named by `--family`, because its checkpoints also match another family.
        cell: a cell or a stack of cells, which networks of any kind contain. Beside other weights it is not taken
            unless it is named by `--family` or `--prefix`: the user may want the whole network.
    """

    name: str
    summary: str
    recognise: Callable[[Tensors], dict[str, object]]
    build: Callable[..., nn.Module]
    convert: Callable[[Tensors, Mapping[str, object]], dict[str, Tensor]] = _same_tensors
    arguments: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    from_shapes: Callable[[Mapping[str, Sequence[int]], Mapping[str, object]], dict[str, object]] = _no_arguments
    by_name: bool = False
    cell: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """All keys that `--set` takes."""
        return (*self.arguments, *self.ignored)

    def infer(self, tensors: Tensors) -> dict[str, object]:
        """Result of `recognise`; raises NotThisFamily also for tensors with an unexpected number of axes."""
        try:
            return self.recognise(tensors)
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            missing = isinstance(error, KeyError)
            raise NotThisFamily(f"a tensor has an unexpected shape ({error})", near=not missing) from error
