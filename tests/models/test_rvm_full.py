"""Sizes of Robust Video Matting at a downsample ratio: exact, in torch and in ONNX Runtime."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from stepcell.models.published.rvm_full import MattingNetwork, _scale

FIRST_WRONG = {0.7: 90, 0.35: 180, 0.65: 20, 0.29: 100, 0.13: 100, 0.58: 50}


@pytest.mark.parametrize("percent", range(1, 101))
def test_every_ratio_of_two_decimals_has_a_scale(percent: int) -> None:
    ratio = Fraction(percent, 100)
    assert abs(_scale(ratio) / float(ratio) - 1) < 2e-7


@pytest.mark.parametrize("ratio", FIRST_WRONG)
def test_sizes_in_torch_and_in_onnx_runtime(ratio: float) -> None:
    scale = MattingNetwork("fast_guided_filter", ratio).ratio
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, "h2", 2])],
        [helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, scale, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    step = FIRST_WRONG[ratio]
    for size in [*range(step, 4001, step), *range(1, 200)]:
        exact = size * Fraction(str(ratio)) // 1
        if exact == 0:
            continue
        x = np.zeros((1, 1, size, 2), np.float32)
        y = F.interpolate(torch.from_numpy(x), scale_factor=(scale, 1.0), mode="bilinear", align_corners=False)
        assert y.shape[2] == exact
        assert session.run(None, {"x": x})[0].shape[2] == exact  # type: ignore[union-attr]


def test_refused_ratios() -> None:
    for ratio in (0.0, 1.5, 0.12345):
        with pytest.raises(ValueError, match="downsample_ratio: expected at most three decimals"):
            MattingNetwork(downsample_ratio=ratio)
    with pytest.raises(ValueError, match=r"round some sizes times 0\.539 differently"):
        MattingNetwork(downsample_ratio=0.539)
