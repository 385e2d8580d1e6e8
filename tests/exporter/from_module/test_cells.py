"""Cells in the conventions of public code, through both doors: a module that is exported, a file that is fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from stepcell.contract import CellSpec, StepContract
from stepcell.exporter import export_onnx, fuse, lift_states
from stepcell.exporter.from_module.model import LiftedModel
from stepcell.exporter.onnx_session import OnnxSession
from tests.exporter.from_module.cells import (
    CX,
    Around,
    AroundKeeper,
    C,
    Dense,
    HalfHard,
    HardGates,
    HardLSTM,
    Layers,
    Normed,
    Packed,
    PackedLSTM,
    Peephole,
    RawParameters,
    Relu,
    ResetAfter,
    ResetAfterJoint,
    Separate,
    SoftenedGates,
    StateFirstNone,
    Sums,
    TorchCell,
    TwoPassGRU,
    dilated,
    separable,
)

GRU = {"op": "stepcell::ConvGRU", "kernel": (3, 3), "reset": "before"}
LSTM = {"op": "stepcell::ConvLSTM", "kernel": (3, 3), "reset": None}
DENSE = {"kernel": (1, 1)}


KNOWN: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "separate": (lambda: Around(Separate()), [GRU]),
    "separate, kernel 1x5": (lambda: Around(Separate((1, 5))), [{**GRU, "kernel": (1, 5)}]),
    "separate, spectral norm": (lambda: Around(Separate(wrap=spectral_norm)), [GRU]),
    "separate, weight norm": (lambda: Around(Separate(wrap=weight_norm)), [GRU]),
    "packed r u, keeps": (lambda: Around(Packed()), [GRU]),
    "h before x": (lambda: Around(StateFirstNone()), [GRU]),
    "six convolutions, two kernels": (lambda: Around(Sums()), [GRU]),
    "raw parameters": (lambda: Around(RawParameters()), [GRU]),
    "dilated": (lambda: Around(Separate(wrap=dilated)), [{**GRU, "kernel": (5, 5)}]),
    "separable": (lambda: Around(Separate(wrap=separable)), [GRU]),
    "two passes on one state": (lambda: Around(TwoPassGRU()), [{**GRU, "kernel": k} for k in ((1, 3), (3, 1))]),
    "reset after": (lambda: Around(ResetAfter()), [{**GRU, "reset": "after"}]),
    "reset after, joint gates": (lambda: Around(ResetAfterJoint()), [{**GRU, "reset": "after"}]),
    "hard gates": (lambda: Around(HardGates()), [{**GRU, "gates": "hard"}]),
    "hard gates of another slope": (lambda: Around(SoftenedGates()), [{**GRU, "gates": "hard"}]),
    "hard lstm": (lambda: Around(HardLSTM("ifog")), [{**LSTM, "kernel": (1, 5), "gates": "hard"}]),
    "lstm ifog": (lambda: Around(PackedLSTM("ifog")), [{**LSTM, "kernel": (1, 5)}]),
    "lstm gofi": (lambda: Around(PackedLSTM("gofi")), [{**LSTM, "kernel": (1, 5)}]),
    "peephole per channel": (lambda: Around(Peephole((1, 1))), [{**LSTM, "peephole": True}]),
    "peephole per pixel": (lambda: Around(Peephole((8, 9))), [{**LSTM, "peephole": True}]),
    "hidden buffers": (AroundKeeper, [LSTM]),
    "dense": (lambda: Around(Dense(), dense=True), [{**GRU, **DENSE}]),
    "torch.nn.GRUCell": (lambda: Around(TorchCell(nn.GRUCell), dense=True), [{**GRU, **DENSE, "reset": "after"}]),
    "torch.nn.LSTMCell": (lambda: Around(TorchCell(nn.LSTMCell), dense=True), [{**LSTM, **DENSE}]),
    "torch.nn.GRU": (
        lambda: Around(Layers(nn.GRU, num_layers=2), dense=True),
        [{**GRU, **DENSE, "reset": "after"}] * 2,
    ),
    "torch.nn.LSTM": (lambda: Around(Layers(nn.LSTM, batch_first=True), dense=True), [{**LSTM, **DENSE}]),
}


def lifted(net: nn.Module) -> LiftedModel:
    dense = isinstance(net.stem, nn.Linear)
    return lift_states(net, {"x": (2, 2) if dense else (2, 2, 8, 9)})


def facts(cells: Sequence[CellSpec]) -> list[dict[str, Any]]:
    return [{"op": c.op, "kernel": c.kernel, "reset": c.reset, "gates": c.gates, "peephole": c.peephole} for c in cells]


def worst_difference(net: nn.Module, path: Path, contract: StepContract, steps: int = 40) -> float:
    """Of the output, the module and the file each with its own state; independent of what export compares itself."""
    session, net = OnnxSession(path.read_bytes(), str(path)), net.eval()
    states = {s.name: s.initial(contract.state_shapes({})[s.name]) for s in contract.states}
    rng, state, worst = torch.Generator().manual_seed(7), None, 0.0
    for _ in range(steps):
        x = torch.randn(contract.inputs[0].shape, generator=rng)  # type: ignore[arg-type]
        with torch.no_grad():
            expected, state = (net(x), None) if isinstance(net, AroundKeeper) else net(x, state)
        results = session({"x": x.numpy(), **{s.input: states[s.name] for s in contract.states}})
        states = {s.name: results[s.output] for s in contract.states}
        worst = max(worst, float(np.abs(results["y"] - expected.numpy()).max()))
    return worst


@pytest.mark.parametrize("name", KNOWN)
def test_a_cell_of_any_convention_becomes_the_op_through_both_doors(name: str, tmp_path: Path) -> None:
    make, expected = KNOWN[name]
    torch.manual_seed(3)
    net = make()
    model = lifted(net)
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes)
    assert facts(contract.cells) == [{"gates": "soft", "peephole": False, **each} for each in expected], contract.cells
    assert all(cell.name.startswith("cell") and cell.hidden == C for cell in contract.cells)
    worst = worst_difference(net, tmp_path / "m.onnx", contract)
    print(f"{name}: {worst:.1e}")
    assert worst < 1e-5, f"{name}: off by {worst:.1e}"
    write_onnx(model, tmp_path / "plain.onnx", dynamo=name.startswith(("torch.nn", "dilated")))
    fused = fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx").contract
    assert facts(fused.cells) == facts(contract.cells), fused.cells
    assert [cell.name.removeprefix("module.") for cell in fused.cells] == [cell.name for cell in contract.cells]


@pytest.mark.parametrize(
    "name",
    [
        "reset after",
        "hard gates of another slope",
        "peephole per channel",
        "two passes on one state",
        "torch.nn.GRU",
        "torch.nn.LSTM",
    ],
)
def test_cells_in_float16_keep_their_float32_states(name: str, tmp_path: Path) -> None:
    make, expected = KNOWN[name]
    torch.manual_seed(3)
    model = lifted(make())
    contract = export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    assert facts(contract.cells) == [{"gates": "soft", "peephole": False, **each} for each in expected]
    assert not [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Cast"]


class Mixed(nn.Module):
    """Two cells with the reset gate before the convolution and one with the gate after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.down = Separate(), ResetAfter(), Separate(), nn.Conv2d(C, CX, 1)

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, list[Tensor]]:
        states = states or [None] * 3
        a = self.a(x, states[0])
        b = self.b(self.down(a), states[1])
        c = self.c(self.down(b), states[2])
        return c, [a, b, c]


def test_a_second_variant_of_an_op_is_listed_without_it(tmp_path: Path) -> None:
    model = lift_states(Mixed(), {"x": (1, CX, 8, 9)})
    contract = export_onnx(model, tmp_path / "m.onnx", shapes=model.example_shapes)
    assert [(cell.name, cell.op is None) for cell in contract.cells] == [("a", False), ("b", True), ("c", False)]
    ops = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node if node.domain == "stepcell"]
    assert ops == ["a/ConvGRU", "c/ConvGRU"]


def write_onnx(model: LiftedModel, path: Path, *, dynamo: bool) -> None:
    """The lifted module as another program writes it: no ops, no contract."""
    tensors = [torch.zeros(tuple(spec.shape)) for spec in (*model.inputs, *model.states)]  # type: ignore[arg-type]
    names = [f"{'hc'[index % 2]}{index // 2}" if len(model.states) > 1 else "h" for index in range(len(model.states))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(tensors),
            str(path),
            dynamo=dynamo,
            opset_version=18,
            input_names=["x", *names],
            output_names=["y", *(f"{name}_next" for name in names)],
            external_data=False,
            verbose=False,
        )


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm in a gate": (Normed, "normalisation (InstanceNormalization) between the convolution and the gate"),
    "relu candidate": (Relu, "takes Relu, and not tanh"),
    "soft and hard": (HalfHard, "hard gates beside soft ones"),
}


@pytest.mark.parametrize("name", LEFT)
def test_another_cell_is_left_with_the_reason_and_is_right_all_the_same(name: str, tmp_path: Path) -> None:
    make, reason = LEFT[name]
    torch.manual_seed(4)
    net = Around(make())
    model = lifted(net)
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32", shapes=model.example_shapes)
    (found,) = contract.cells
    assert (found.name, found.op, found.hidden) == ("cell", None, C)
    assert reason in (found.reason or ""), found
    assert f"left:    cell: {found.reason}" in model.describe(contract)
    assert worst_difference(net, tmp_path / "m.onnx", contract) < 1e-5
