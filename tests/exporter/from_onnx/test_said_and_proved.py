"""What a user says of states and inputs, and what the graph proves; small networks of ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.errors import ExportError, InputError, UsageError
from stepcell.exporter.from_onnx.fuse import fuse
from stepcell.runtime.media.preprocess import image_input
from tests.exporter.from_onnx.conftest import Adopt

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns of itself


class Layer(nn.Module):
    """One layer of torch with its states as arguments."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 8, batch_first=True, **options)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor | None = None) -> Any:
        if c0 is None:
            return self.layer(x, h0)
        y, (h, c) = self.layer(x, (h0, c0))
        return y, h, c


def test_swapped_pairs_are_taken_with_what_the_graph_says(adopt: Adopt, tmp_path: Path) -> None:
    inputs = {"x": torch.zeros(1, 1, 6), "h0": torch.zeros(1, 1, 8), "c0": torch.zeros(1, 1, 8)}
    notes = adopt(Layer("LSTM"), inputs, "y hn cn", states={"h0": "cn", "c0": "hn"}).notes
    assert ["starts from h0 and leaves hn" in notes[0], "--state c0=cn" in notes[1]] == [True, True]
    assert not adopt(Layer("LSTM"), inputs, "y hn cn", states={"h0": "hn", "c0": "cn"}).notes


def test_a_state_read_in_both_directions_is_asked_about(adopt: Adopt, tmp_path: Path) -> None:
    inputs = {"x": torch.zeros(1, 4, 6), "h0": torch.zeros(2, 1, 8)}
    both = Layer("GRU", bidirectional=True)
    with pytest.raises(UsageError, match=r"h0: GRU .* reads its sequence in both directions") as caught:
        adopt(both, inputs, "y hn")
    assert "--state h0= (data of every call) or --state h0=hn (fed back anyway)" in str(caught.value.hint)
    assert not adopt(both, inputs, "y hn", states={"h0": ""}).contract.states
    report = adopt(both, inputs, "y hn", states={"h0": "hn"})
    assert [state.name for state in report.contract.states] == ["h"]
    assert "in both directions" in report.notes[0]
    assert "as --state says" in report.notes[0]


def test_a_projection_that_torch_drops_is_named(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    example = torch.zeros(1, 1, 6), torch.zeros(1, 1, 4), torch.zeros(1, 1, 8)
    names = {"input_names": ["x", "h0", "c0"], "output_names": ["y", "hn", "cn"]}
    torch.onnx.export(Layer("LSTM", proj_size=4).eval(), example, str(tmp_path / "a.onnx"), verbose=False, **names)
    with pytest.raises(ExportError, match=r"cell state has 8 features, and hidden_size is 4: .*proj_size") as caught:
        fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "--module" in str(caught.value.hint)


def test_a_file_with_a_contract_takes_a_value(adopt: Adopt, tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = 0.5 * h + k * x
            return h, h

    picture = torch.zeros(1, 3, 4, 6)
    adopt(Mixed(), {"x": picture, "k": torch.tensor(0.0), "h": picture}, "y h_out")
    frame = np.ones((1, 3, 4, 6), np.float32)
    with StepLoop.open(tmp_path / "b.onnx") as loop:
        with pytest.raises(InputError):
            loop.step(x=frame)
        with pytest.raises(InputError, match="takes k besides x") as caught:
            image_input(loop.contract)
    assert "stepcell fuse MODEL --value k=3 -o NEW.onnx" in str(caught.value.hint)
    assert fuse(tmp_path / "b.onnx", tmp_path / "c.onnx", values={"k": [3]}).redeclared
    with StepLoop.open(tmp_path / "c.onnx") as loop:
        assert image_input(loop.contract).name == "x"
        np.testing.assert_array_equal(loop.step(x=frame)["y"], 3 * frame)
        np.testing.assert_array_equal(loop.step(x=frame, k=np.float32(1))["y"], 2.5 * frame)
    with pytest.raises(UsageError, match="--value h: no such input"):
        fuse(tmp_path / "b.onnx", tmp_path / "c.onnx", values={"h": [3]})
