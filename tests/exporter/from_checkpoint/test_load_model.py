"""load_model: gradients reach every parameter of every family, and a trained model is saved and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.cli import main
from stepcell.dims import resolve, symbols_of
from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter import load_model
from stepcell.models import initial_states, run_sequence, save_checkpoint
from tests.golden.cases import KEPT, Case, find_cases

CASES = find_cases(places=[KEPT])
every_family = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def loaded(case: Case) -> nn.Module:
    return load_model(case.path / "checkpoint.pth", case.family, **case.settings)


def frames(model: Any, steps: int) -> list[list[Tensor]]:
    """Random inputs of small sizes."""
    rng = torch.Generator().manual_seed(0)
    known = symbols_of(dim for spec in model.inputs for dim in spec.shape)
    sizes = {**dict.fromkeys(known, 16), "batch": 2, **getattr(model, "examples", {})}
    shapes = [resolve(spec.shape, sizes) for spec in model.inputs]
    return [[torch.rand(shape, generator=rng) for shape in shapes] for _ in range(steps)]


@every_family
def test_gradients_reach_every_parameter_of_every_family(case: Case) -> None:
    model = loaded(case)
    assert model.training
    clip = frames(model, 3)
    states = initial_states(model, *clip[0])  # type: ignore[arg-type]
    loss = torch.zeros(())
    for frame in clip:
        results = model(*frame, *states)
        states = results[len(model.outputs) :]  # type: ignore[arg-type]
        loss = loss + sum(result.float().square().mean() for result in results)
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())  # type: ignore[arg-type]


def test_a_published_checkpoint_is_trained_saved_and_exported_without_naming_it(tmp_path: Path) -> None:
    case = find_cases("rvm_convgru", [KEPT])[0]
    model = loaded(case)
    channels = model.inputs[0].shape[1]  # type: ignore[index, union-attr]
    x = torch.rand(6, 1, int(channels), 12, 16, generator=torch.Generator().manual_seed(1))
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(12):
        y, _ = run_sequence(model, x)  # type: ignore[arg-type]
        loss = (y - x.flip(3)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], f"nothing was learned: {losses[0]:.3f} to {losses[-1]:.3f}"

    save_checkpoint(model, tmp_path / "tuned.safetensors")
    again = load_model(tmp_path / "tuned.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    arguments = ["export", tmp_path / "tuned.safetensors", "-o", tmp_path / "tuned.onnx", "--precision", "float32"]
    arguments += ["--shape", f"x:1x{channels}x12x16"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "family:  rvm_convgru" in result.output
    with torch.no_grad():
        expected, _ = run_sequence(model.eval(), x)  # type: ignore[arg-type]
    with StepLoop.open(tmp_path / "tuned.onnx") as loop:
        got = np.stack([loop.step(x=frame.numpy())["y"] for frame in x])
    worst = float(np.abs(got - expected.numpy()).max())
    assert worst < 1e-5, f"the exported file is off by {worst:.1e}"


@every_family
def test_every_family_is_known_again_after_saving(case: Case, tmp_path: Path) -> None:
    model = loaded(case)
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = find_cases("rvm_convgru", [KEPT])[0]
    with pytest.raises(UsageError, match="no such argument"):
        load_model(case.path / "checkpoint.pth", nonsense=1)
    with pytest.raises(CheckpointError, match="not a checkpoint of family"):
        load_model(case.path / "checkpoint.pth", "rvm_full")
    save_checkpoint(nn.Linear(2, 2), tmp_path / "l.safetensors", family="rvm_convgru", arguments={"channels": 2})
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "l.safetensors")
