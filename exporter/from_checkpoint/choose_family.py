"""The family of a checkpoint, and the part of the file that holds its weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter.from_checkpoint.checkpoint import Checkpoint
from stepcell.exporter.from_checkpoint.dense_weights import first_problem
from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.registry import FAMILIES, find_family
from stepcell.exporter.from_checkpoint.part import Miss, Part, ask, fitting_parts, lines_of, report

__all__ = ["choose_family"]

Match = tuple[Family, dict[str, object]]
_MODULE = "--module package.module:factory"


def choose_family(
    checkpoint: Checkpoint, name: str | None = None
) -> tuple[Family, dict[str, object], Part[list[Match]]]:
    """The family, the arguments that its tensors determine, and its part of the file.

    Args:
        name: name or former name of a family; by default the one that the file names or its tensors match.

    Raises:
        UsageError: an unknown family, or several parts of the file fit; the hint has the options that choose one.
        CheckpointError: none fits.
    """
    name = name or checkpoint.family
    if name is not None and name == checkpoint.family and checkpoint.arguments:
        return _saved(checkpoint, find_family(name))
    families = [each for each in FAMILIES.values() if not each.by_name] if name is None else [find_family(name)]
    parts, misses = fitting_parts(checkpoint, lambda tensors: _matching(tensors, families))
    found = [(part, family, inferred) for part in parts for family, inferred in part.match]
    if not found:
        raise _no_match(checkpoint, misses, None if name is None else families[0])
    if len(found) > 1:
        raise _several(checkpoint, found)
    part, family, inferred = found[0]
    if family.cell and part.left_out and name is None and checkpoint.prefix is None:
        raise ask(
            checkpoint,
            f"{len(part.tensors)} of its {len(part.tensors) + len(part.left_out)} tensors fit family {family.name}, a "
            "cell; the whole network is of no known family",
            [
                f"--prefix {shlex.quote(part.prefix)}  (the {family.name} alone)",
                f"{_MODULE}  (the whole network, as your own module)",
            ],
        )
    report(checkpoint, part, family.name, misses)
    return family, inferred, part


def _saved(checkpoint: Checkpoint, family: Family) -> tuple[Family, dict[str, object], Part[list[Match]]]:
    """A file of `save_checkpoint`, which stores every argument beside upstream's tensors or those of the step model."""
    try:
        inferred = family.infer(checkpoint.tensors)
    except NotThisFamily:
        inferred = {}
    return family, inferred, Part(checkpoint.key, "", checkpoint.tensors, (), [(family, inferred)])


def _matching(tensors: Tensors, families: Sequence[Family]) -> list[Match]:
    """The families that these tensors are a checkpoint of, at least one."""
    matching: list[Match] = []
    reasons: list[tuple[Family, NotThisFamily]] = []
    for family in families:
        try:
            matching.append((family, family.infer(tensors)))
        except NotThisFamily as reason:
            reasons.append((family, reason))
    if matching:
        return matching
    close = [f"{family.name}: {reason}" for family, reason in reasons if reason.near]
    raise NotThisFamily(
        "; ".join(close or [f"{family.name}: {reason}" for family, reason in reasons]), near=bool(close)
    )


def _several(checkpoint: Checkpoint, found: Sequence[tuple[Part[list[Match]], Family, object]]) -> UsageError:
    parts, families = [part for part, *_ in found], [family.name for _, family, _ in found]
    names = list(dict.fromkeys(families))
    if len({(part.key, part.prefix) for part in parts}) == 1:
        rule = f"matches several families: {', '.join(names)}"
    elif len(names) == 1:
        rule = f"{len(parts)} sets of weights in it fit family {names[0]}"
    else:
        rule = f"{len({(part.key, part.prefix) for part in parts})} parts of it fit a family ({', '.join(names)})"
    return ask(checkpoint, rule, lines_of(parts, families))


def _no_match(checkpoint: Checkpoint, misses: Sequence[Miss], family: Family | None) -> CheckpointError:
    near = [miss for miss in misses if miss.reason.near] or list(misses[:1])
    places = {(miss.key, miss.prefix): str(miss.reason) for miss in near}
    reasons = "; ".join(
        (f"under {prefix} " if prefix and prefix != checkpoint.prefix else "") + reason
        for (_, prefix), reason in places.items()
    )
    entries = f"; entries that are no tensors: {', '.join(checkpoint.odd[:4])}" if checkpoint.odd else ""
    if (problem := first_problem(checkpoint.tensors)) is not None:
        entries += f"; tensor {problem[0]}: {problem[1]}"
    if family is not None:
        reasons = reasons.replace(f"{family.name}: ", "")
        return CheckpointError(
            f"{checkpoint.path}: not a checkpoint of family {family.name}: {reasons or 'no part of it fits'}{entries}"
        )
    hint = f"name it with --family, or give your own module with {_MODULE}"
    if near and near[0].reason.near:
        return CheckpointError(f"{checkpoint.path}: matches no known model family ({reasons}){entries}", hint=hint)
    names = list(checkpoint.tensors)
    holds = f"{len(names)} tensors: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
    return CheckpointError(
        f"{checkpoint.path}: matches no known model family; it holds {holds}{entries}",
        hint=f"{hint}\n  " + reasons.replace("; ", "\n  "),
    )
