"""Sizes and steps of the check after an export, by what a step costs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from stepcell import StateSpec, TensorSpec
from stepcell.contract import StepContract
from stepcell.exporter.step_onnx.check import STEPS, _torch_step
from stepcell.exporter.step_onnx.check_cost import affordable
from stepcell.exporter.step_onnx.contract import contract_for, sizes_for_check


class Wide(nn.Module):
    """A product of every pixel's features: channels ** 2 multiplications a pixel."""

    def __init__(self, channels: int, *, multiple: int = 1) -> None:
        super().__init__()
        shape = ("batch", channels, "height", "width")
        self.inputs = [TensorSpec(name="x", shape=shape, layout="NCHW", pad_multiple=multiple)]
        self.outputs = [TensorSpec(name="y", shape=shape)]
        self.states = [StateSpec(name="h", shape=shape)]
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = 0.5 * h + self.mix(x)
        return h, h


def contract_of(net: nn.Module, **shapes: tuple[int, ...]) -> StepContract:
    return contract_for(net, precision="float32", state_dtype="float32", shapes=shapes, dynamic=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("channels", "multiple", "first", "second", "says"),
    [
        (64, 1, (32, 40), (33, 30), ""),
        (
            1024,
            1,
            (20, 24),
            (21, 18),
            "check:   at 20x24 and 21x18 in place of 32x40 and 33x30, where a step takes 1.3",
        ),
        (1024, 16, (32, 32), (48, 48), "check:   at 32x32 and 48x48 in place of 32x48 and 48x32"),
    ],
)
def test_an_expensive_step_is_compared_at_smaller_sizes(
    channels: int,
    multiple: int,
    first: tuple[int, int],
    second: tuple[int, int],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    net = Wide(channels, multiple=multiple)
    contract = contract_of(net)
    with caplog.at_level(logging.INFO):
        sizes, steps = affordable(_torch_step(net, contract), contract, STEPS)
    assert [(each["height"], each["width"]) for each in sizes] == [first, second]
    assert [each["batch"] for each in sizes] == [1, 2]
    assert steps == STEPS
    assert says in caplog.text
    assert bool(says) == ("check:" in caplog.text)


def test_sizes_are_not_smaller_than_the_module_takes() -> None:
    class Pyramid(Wide):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            if min(x.shape[2:]) < 30:
                raise ValueError("too small for five levels")
            return super().forward(x, h)

    contract = contract_of(net := Pyramid(1024))
    sizes, steps = affordable(_torch_step(net, contract), contract, STEPS)
    assert (sizes, steps) == (sizes_for_check(contract), STEPS)


def test_sizes_that_are_fixed_get_fewer_steps(caplog: pytest.LogCaptureFixture) -> None:
    net = Wide(1024)
    contract = contract_of(net, x=(1, 1024, 56, 64))
    with caplog.at_level(logging.INFO):
        sizes, steps = affordable(_torch_step(net, contract), contract, STEPS)
    assert sizes == sizes_for_check(contract)
    assert steps == int(STEPS * 2e9 / (1024**2 * 56 * 64))
    assert f"check:   {steps} steps in place of {STEPS}, since each takes 3.8 billion multiplications" in caplog.text
    assert affordable(_torch_step(net, contract), contract, 4)[1] == 4


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_the_two_sizes_differ_at_every_scale(scale: float) -> None:
    first, second = sizes_for_check(contract_of(Wide(4)), scale=scale)
    assert all(first[symbol] != second[symbol] for symbol in ("batch", "height", "width"))
    assert min(*first.values(), *second.values()) >= 1
