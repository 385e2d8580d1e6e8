"""Initial states that are not zero: from the module into the contract, compared with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from stepcell.contract import InitialValue
from stepcell.errors import ContractError, ExportError
from stepcell.exporter import export_onnx
from stepcell.exporter.step_onnx import check
from stepcell.exporter.step_onnx.contract import contract_for
from stepcell.models import CellStack, ConvGRUCell, initial_states


def stack(**initial: torch.Tensor) -> CellStack:
    torch.manual_seed(0)
    model = CellStack([ConvGRUCell(3, 4)])
    model.initial = initial
    return model


def test_the_file_says_it(tmp_path: Path) -> None:
    path, value = tmp_path / "model.onnx", torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(4, 1, 1)
    contract = export_onnx(stack(h=value), path, precision="float32")
    (state,) = contract.states
    assert isinstance(state.init, InitialValue)
    np.testing.assert_array_equal(state.init.array(), value.numpy())
    (text,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == "stepcell.contract"]
    init = json.loads(text)["states"][0]["init"]
    assert (init["shape"], init["dtype"]) == ([4, 1, 1], "float32")


def test_parity_starts_there_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, value = tmp_path / "model.onnx", torch.tensor([1.0, -2.0, 0.5, 3.0]).reshape(4, 1, 1)
    contract = export_onnx(stack(h=value), path, precision="float32")
    starts: list[np.ndarray] = []
    for name in ("_torch_step", "file_step"):
        make = getattr(check, name)

        def recording(*arguments: Any, make: Any = make, **options: Any) -> Any:
            step, first = make(*arguments, **options), [True]

            def recorded(inputs: Any, states: Any) -> Any:
                if first.pop() if first else False:
                    starts.append(np.unique(states["h"], axis=None))
                return step(inputs, states)

            return recorded

        monkeypatch.setattr(check, name, recording)
    check.check_export(stack(h=value).eval(), path.read_bytes(), contract, steps=2)
    assert len(starts) == 2
    for found in starts:
        np.testing.assert_array_equal(found, [-2.0, 0.5, 1.0, 3.0])


def test_a_float16_state_and_a_parameter(tmp_path: Path) -> None:
    model = stack(h=torch.nn.Parameter(torch.full((4, 1, 1), 0.1)))
    contract = export_onnx(model, tmp_path / "model.onnx", state_dtype="float16")
    (state,) = contract.states
    assert isinstance(state.init, InitialValue)
    assert state.init.array().dtype == np.float16
    x = torch.zeros(2, 3, 5, 6)
    (initial,) = initial_states(model, x)
    assert initial.shape == (2, 4, 5, 6)
    assert initial.requires_grad
    assert initial.min() == initial.max() == np.float32(0.1)


def test_a_value_per_position_needs_fixed_sizes() -> None:
    model = stack(h=torch.zeros(4, 8, 8))
    options = {"precision": "float32", "state_dtype": "float32", "dynamic": ()}
    contract_for(model, shapes={"x": (1, 3, 8, 8)}, **options)
    with pytest.raises(ContractError, match=r"h: initial value: expected shape \(4, 'height', 'width'\)") as caught:
        contract_for(model, shapes={}, **options)
    assert "--shape" in str(caught.value.hint)


def test_refused_values() -> None:
    options = {"precision": "float32", "state_dtype": "float32", "dynamic": (), "shapes": {}}
    with pytest.raises(ExportError, match="the model has no state 'c'"):
        contract_for(stack(c=torch.zeros(4, 1, 1)), **options)
    for value, message in (
        (torch.zeros(3, 1, 1), "expected shape"),
        (torch.zeros(1, 4, 1, 1), "expected shape"),
        (torch.full((4, 1, 1), torch.nan), "holds NaN or Inf"),
    ):
        with pytest.raises(ContractError, match=f"h: initial value: {message}"):
            contract_for(stack(h=value), **options)
