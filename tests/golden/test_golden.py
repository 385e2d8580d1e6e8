"""Golden cases of every family: the exported file equals upstream, and a wrong convention is detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stepcell.exporter import FAMILIES
from stepcell.exporter.from_checkpoint.families.registry import PUBLISHED
from stepcell.models import ConvGRUCell, ConvLSTMCell
from tests.golden.cases import KEPT, RECORDED, Case, exported, find_cases, worst_error
from tests.golden.evaluated import differences_in_float64
from tests.golden.report import DOCUMENT, families

CASES = [case for case in find_cases() if case.family in FAMILIES]


def label(case: Case) -> str:
    return case.name + ("-kept" if case.path.is_relative_to(KEPT) else "")


class Exported(NamedTuple):
    path: Path
    in_float64: float  # worst difference to the module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Exported]:
    """The file of a case; a kept case has the checkpoint of the recorded one whose first steps it holds."""

    made: dict[tuple[bytes, str], Exported] = {}

    def file(case: Case) -> Exported:
        key = (case.path / "checkpoint.pth").read_bytes(), f"{case.family} {sorted(case.settings.items())}"
        if key not in made:
            path = exported(case, tmp_path_factory.mktemp("golden"))
            made[key] = Exported(path, max(differences_in_float64(case, path)))
        return made[key]

    return file


@pytest.mark.parametrize("case", CASES, ids=map(label, CASES))
def test_exported_file_equals_upstream(case: Case, files: Callable[[Case], Exported]) -> None:
    file = files(case)
    worst = worst_error(case, file.path)
    print(f"{case.name}: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    assert worst, "nothing was compared"
    assert max(worst.values()) <= case.tolerance
    # float64 has no rounding to hide behind, but constants are float32 in the file: epsilons of norms, and the mean and
    # standard deviation of pixels in rvm_full
    limit = 1e-6 if case.family == "rvm_full" else 1e-9
    assert file.in_float64 <= limit


def test_the_document_lists_every_family() -> None:
    assert DOCUMENT.read_text().startswith(families()), "run python -m tests.golden.report --families"


def test_every_published_family_has_a_case() -> None:
    if not RECORDED.is_dir():
        pytest.skip(f"needs all recorded cases in {RECORDED}; STEPCELL_GOLDEN names another folder")
    assert {family.name for family in PUBLISHED} == {case.family for case in CASES}


# Wrong conventions that load without an error: each must give an error far beyond the tolerance.


def _cell(model: nn.Module) -> ConvGRUCell | ConvLSTMCell:
    return next(child for child in model.modules() if isinstance(child, (ConvGRUCell, ConvLSTMCell)))


def _reorder(parameter: Tensor, order: list[int], count: int) -> None:
    blocks = parameter.detach().clone().chunk(count)
    parameter.data.copy_(torch.cat([blocks[index] for index in order]))


def gate_order(model: nn.Module) -> None:
    cell = _cell(model)
    _reorder(cell.weight_x, [1, 0, 2], 3)
    _reorder(cell.bias, [1, 0, 2], 3)
    _reorder(cell.weight_h, [1, 0], 2)


def concatenation_order(model: nn.Module) -> None:
    cell = _cell(model)
    assert isinstance(cell, ConvGRUCell)
    x, h = cell.weight_x.detach().clone(), torch.cat([cell.weight_h, cell.weight_n]).detach()
    cell.weight_x.data.copy_(h)
    cell.weight_h.data.copy_(x[: 2 * cell.hidden_size])
    cell.weight_n.data.copy_(x[2 * cell.hidden_size :])


def update_rule(model: nn.Module) -> None:
    cell = _cell(model)
    for parameter in (cell.weight_x, cell.weight_h, cell.bias):
        parameter.data[: cell.hidden_size].neg_()


def reset_placement(model: nn.Module) -> None:
    cell = _cell(model)
    assert isinstance(cell, ConvGRUCell)
    cell.reset, cell.bias_n = "after", nn.Parameter(torch.zeros(cell.hidden_size))


def padding(model: nn.Module) -> None:
    """All kernels shifted by one pixel, as with all padding on one side."""
    cell = _cell(model)
    cell.weight_x.data.copy_(cell.weight_x.roll(1, dims=3))
    cell.weight_h.data.copy_(cell.weight_h.roll(1, dims=3))


def hard_gates(model: nn.Module) -> None:
    _cell(model).gates = "hard"


def packing(model: nn.Module) -> None:
    """Gates in the order i, f, g, o of torch.nn.LSTM instead of i, f, o, g."""
    cell = _cell(model)
    for parameter in (cell.weight_x, cell.weight_h, cell.bias):
        _reorder(parameter, [0, 1, 3, 2], 4)


MISTAKES = [(change, "rvm_convgru") for change in (gate_order, concatenation_order, update_rule, reset_placement)]
MISTAKES += [(padding, "rvm_convgru"), (hard_gates, "rvm_convgru"), (packing, "ndrplz_convlstm")]


@pytest.mark.parametrize(("change", "family"), MISTAKES, ids=[change.__name__ for change, _ in MISTAKES])
def test_a_wrong_convention_does_not_pass(change: Callable[[nn.Module], None], family: str, tmp_path: Path) -> None:
    case = find_cases(family, [RECORDED, KEPT])[0]
    error = max(worst_error(case, exported(case, tmp_path, change=change)).values())
    print(f"{change.__name__}: off by {error:.2f}")
    assert error > 1000 * case.tolerance
