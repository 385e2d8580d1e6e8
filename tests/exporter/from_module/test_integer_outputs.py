"""Modules whose answer is labels, a mask or bytes, with the range of their pixels declared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepcell import Pixels, StepLoop, export_onnx, lift_states
from stepcell.runtime.verify.clips import random_clip


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.memory: Tensor | None = None

    def forward(self, frame: Tensor) -> dict[str, Tensor]:
        x = self.stem(frame).tanh()
        self.memory = 0.8 * (torch.zeros_like(x) if self.memory is None else self.memory) + 0.2 * x
        y = self.head(self.memory)
        return {
            "labels": y.argmax(1),
            "mask": y[:, :1] > 0,
            "small": y.argmax(1, keepdim=True).to(torch.uint8),
            "data": (y[:, :3].sigmoid() * 255).to(torch.uint8),
            "soft": y.softmax(1).float(),
        }


@pytest.fixture
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter().eval()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_labels_masks_and_bytes_are_exported(segmenter: Segmenter, tmp_path: Path, precision: str) -> None:
    model = lift_states(segmenter, {"frame": (1, 3, 24, 32)})
    path = tmp_path / "labels.onnx"
    contract = export_onnx(
        model,
        path,
        precision=precision,
        shapes=model.example_shapes,
        pixels=Pixels(range=(0, 1)),  # type: ignore[arg-type]
    )
    outputs = {spec.name: spec for spec in contract.outputs}
    dtypes = {name: spec.dtype for name, spec in outputs.items()}
    assert dtypes == {"labels": "int64", "mask": "bool", "small": "uint8", "data": "uint8", "soft": precision}
    assert [outputs[name].layout for name in ("labels", "mask", "data")] == ["NHW", "NCHW", "NCHW"]
    assert (contract.inputs[0].range, outputs["data"].range, outputs["labels"].range) == ((0, 1), (0, 255), None)
    assert contract.parity is not None
    assert contract.parity.differing.keys() == {"labels", "mask", "small", "data"}
    assert contract.parity.max_abs_error["data"] <= 1
    if precision == "float16":
        return
    clip = random_clip(contract, {}, count=20)
    segmenter.memory = None
    with StepLoop.open(path) as loop, torch.no_grad():
        for frame in clip.frames:
            assert 0 <= frame["frame"].min() < frame["frame"].max() <= 1
            got, expected = loop.step(**frame), segmenter(torch.from_numpy(frame["frame"]))
            for name, array in got.items():
                if name == "soft":
                    np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5)
                else:
                    assert np.mean(array != expected[name].numpy()) < 0.01, name
