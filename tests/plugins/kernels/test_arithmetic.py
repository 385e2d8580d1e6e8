"""Every kernel in Triton's interpreter against float64: state fed back, outputs poisoned and guarded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from stepcell.plugins.kernels.cell_config import CellConfig
from stepcell.plugins.kernels.packing import pack
from stepcell.plugins.kernels.signature import PARAMETERS
from stepcell.plugins.kernels.tiles import Tile

# Relative to max(1, |value|). The spacing of float16 below 2 is 1e-3, and what follows from rounding
# r . h, z and the state's fp16 mirror stays below that over 16 steps.
WIDE_STATE = 1.5e-3
HALF_STATE = 4e-3  # the state itself is rounded at every step

TILE = Tile(32, 32, 64, 2)
SIZE = (2, 3, 7)  # two programs of pixels, the second of them ragged
CELLS = [
    "gru_x16_h16_k3x3_soft_float32",
    "gru_x64_h64_k1x1_soft_float32",  # a block of the loop lies within one tap; two programs of channels
    "gru_x3_h5_k3x3_soft_float32",  # padding channels everywhere
    "gru_x8_h12_k3x3_hard_float16",
    "gru_x8_h16_k1x5_soft_float32_pre",
    "gru_x0_h16_k5x1_soft_float32_pre",
    "gru-after_x16_h16_k3x3_soft_float32",
    "gru-after_x3_h5_k1x5_hard_float16",
    "gru-after_x0_h20_k5x1_soft_float32_pre",
    "lstm_x16_h16_k3x3_soft_float32",
    "lstm_x3_h5_k3x3_hard_float16",
    "lstm_x32_h40_k1x1_soft_float32_pre",
    "lstm-channel_x8_h12_k3x3_soft_float32",
    "lstm-map_x5_h6_k3x3_soft_float16_pre",
]
LARGER = [
    "gru_x8_h8_k7x7_soft_float32",
    "gru_x64_h64_k3x3_soft_float32",
    "gru-after_x20_h40_k5x5_soft_float32",
    "lstm-map_x64_h24_k3x5_soft_float32",
]


def assert_close(cell: CellConfig, worst: dict[str, float]) -> None:
    limit = WIDE_STATE if cell.state_dtype == "float32" else HALF_STATE
    assert max(worst.values()) <= limit, f"{cell.label}: worst difference to float64 {worst}, allowed {limit}"


@pytest.mark.parametrize("label", CELLS)
def test_sixteen_steps_equal_float64(label: str, steps: Any) -> None:
    cell = CellConfig.from_label(label)
    assert_close(cell, steps(cell, size=SIZE, tile=TILE).run(16))


@pytest.mark.parametrize("label", LARGER)
def test_larger_kernels_and_more_channels(label: str, steps: Any) -> None:
    cell = CellConfig.from_label(label)
    assert_close(cell, steps(cell, size=SIZE, tile=TILE).run(2))


@pytest.mark.parametrize("op", ["gru", "gru-after", "lstm-map"])
def test_without_a_given_fp16_mirror_the_state_is_narrowed_first(op: str, steps: Any) -> None:
    cell = CellConfig.from_label(f"{op}_x5_h20_k3x3_soft_float32")
    assert_close(cell, steps(cell, size=(2, 3, 5), tile=TILE, fp16_mirror=False).run(4))


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 1), Tile(128, 32, 64, 4), Tile(16, 64, 32, 3)])
def test_every_tile_shape_gives_the_same(tile: Tile, steps: Any) -> None:
    for op in ("gru", "gru-after", "lstm"):
        cell = CellConfig.from_label(f"{op}_x24_h24_k1x3_soft_float32")
        assert_close(cell, steps(cell, size=(1, 3, 6), tile=tile, fp16_mirror=False).run(2))


SPLIT = [  # of up to 5 steps in either half of the loop: even, uneven, and with some that get none
    ("gru_x16_h16_k3x3_soft_float32", 2),
    ("gru_x3_h20_k3x1_hard_float16_pre", 3),
    ("gru-after_x12_h12_k3x3_soft_float32", 7),
    ("gru-after_x8_h8_k3x3_soft_float16", 2),
    ("lstm-channel_x8_h12_k3x3_soft_float32", 3),
]


@pytest.mark.parametrize(("label", "splits"), SPLIT)
def test_split_programs_add_up(label: str, splits: int, steps: Any) -> None:
    """Sixteen steps; partial sums are poisoned before each launch, and its counters zero after it (conftest.py)."""
    cell = CellConfig.from_label(label)
    assert_close(cell, steps(cell, size=(1, 5, 7), tile=Tile(32, 16, 32, 2, splits=splits)).run(16))


@pytest.mark.parametrize(("label", "splits"), SPLIT)
def test_the_order_of_arrival_changes_no_bit(
    label: str, splits: int, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of the whole kernel, up to rounding, and no one but the last writes it."""
    cell, last_first, outputs = CellConfig.from_label(label), False, list[torch.Tensor]()
    set_grid_idx = interpreter_builder.set_grid_idx

    def in_order(x: int, y: int, z: int) -> None:
        """Called before each program, those of a tile on end."""
        if (x, y, z) == (0, 0, splits - 1):
            assert all(output.isnan().all() for output in outputs), "written before the last program"
        set_grid_idx(x, y, splits - 1 - z if last_first else z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", in_order)

    def launch(kernel: str, cell: CellConfig, tile: Tile, buffers: Mapping[str, torch.Tensor], size: Any) -> None:
        nonlocal last_first
        outputs[:] = [buffers[p.buffer] for p in PARAMETERS[kernel] if p.name.endswith("_out")]
        found = []
        for one, order in ((replace(tile, splits=1), False), (tile, True), (tile, False)):
            last_first = order
            for output in outputs:
                output.fill_(float("nan"))
            steps.launch(kernel, cell, one, buffers, size)
            found.append([output.clone() for output in outputs])
        for whole, backward, forward in zip(*found, strict=True):
            assert torch.equal(backward, forward), f"{kernel}: the order of arrival changes the result"
            worst = float((whole.double() - forward.double()).abs().max())
            assert worst < (1e-5 if forward.dtype == torch.float32 else 2e-3), f"{kernel}: differs by {worst:.1e}"

    steps(cell, size=(1, 5, 7), tile=Tile(32, 16, 32, 2, splits=splits), launch=launch).run(2)


@st.composite
def cells(draw: Any) -> CellConfig:
    """Any cell of small size."""
    word = draw(st.sampled_from(["gru", "gru-after", "lstm", "lstm-channel", "lstm-map"]))
    inputs = draw(st.integers(0, 32))
    pre = inputs == 0 or draw(st.booleans())
    height, width = draw(st.sampled_from([(1, 1), (3, 3), (1, 5), (5, 1), (3, 1), (5, 3)]))
    sizes = f"_x{inputs}_h{draw(st.integers(1, 32))}_k{height}x{width}"
    gates, state = draw(st.sampled_from(["soft", "hard"])), draw(st.sampled_from(["float32", "float16"]))
    return CellConfig.from_label(f"{word}{sizes}_{gates}_{state}" + "_pre" * pre)


@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    cell=cells(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    tile=st.builds(
        Tile,
        pixels=st.sampled_from([64, 128]),
        channels=st.sampled_from([16, 32]),
        depth=st.sampled_from([32, 64]),
        stages=st.just(2),
        splits=st.sampled_from([1, 1, 2, 5]),
    ),
    fp16_mirror=st.booleans(),
    seed=st.integers(0, 9),
)
@example(
    cell=CellConfig.from_label("gru_x8_h8_k7x7_soft_float32"), size=(1, 1, 1), tile=TILE, fp16_mirror=False, seed=0
)  # one pixel, kernel larger
@example(
    cell=CellConfig.from_label("lstm_x8_h8_k5x5_soft_float32"), size=(1, 1, 40), tile=TILE, fp16_mirror=False, seed=0
)  # wide
@example(
    cell=CellConfig.from_label("gru-after_x8_h8_k5x5_soft_float32"),
    size=(3, 40, 1),
    tile=TILE,
    fp16_mirror=True,
    seed=0,
)  # narrow
def test_any_cell_any_size(
    steps: Any, cell: CellConfig, size: tuple[int, int, int], tile: Tile, fp16_mirror: bool, seed: int
) -> None:
    assert_close(cell, steps(cell, size=size, tile=tile, fp16_mirror=fp16_mirror, seed=seed).run(2))


def test_a_wide_state_moves_by_less_than_half_can_hold(steps: Any) -> None:
    """h + z (1 - h) with z = 3e-4: every step adds less than half the spacing of float16."""
    cell = CellConfig.from_label("gru_x8_h8_k1x1_soft_float32")
    weights = {
        "W_x": np.zeros((24, 8, 1, 1)),
        "W_h": np.zeros((16, 8, 1, 1)),
        "W_n": np.zeros((8, 8, 1, 1)),
        "b": np.repeat([-8.0, 0.0, 8.0], 8),
    }
    worst = steps(cell, size=(1, 2, 3), tile=TILE, weights=weights).run(32)
    assert worst["h"] < 1e-4, worst  # 32 steps move h by up to 0.02; rounded to half it would stay


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of numpy: inf is right
@pytest.mark.parametrize("hard", [False, True])
def test_activations_saturate_and_keep_a_nan(hard: bool, apply_activations: Any) -> None:
    x = torch.tensor([float("nan"), float("-inf"), -200.0, -0.7, 0.0, 0.7, 200.0, float("inf")])
    out = torch.full((16,), 7.0)
    apply_activations(x, out, HARD=hard)
    sigmoid, tanh = (torch.clamp(x / 2 + 0.5, 0, 1), x.clamp(-1, 1)) if hard else (torch.sigmoid(x), torch.tanh(x))
    torch.testing.assert_close(out, torch.cat([sigmoid, tanh]), equal_nan=True, atol=1e-6, rtol=0)


def test_a_nan_reaches_no_further_than_the_kernel(steps: Any) -> None:
    """Nine taps of eight channels fill two blocks of 64 with lanes to spare, which must read nothing."""
    cell, size = CellConfig.from_label("lstm_x8_h8_k3x3_soft_float16"), (1, 8, 8)
    weights = {"W_x": np.ones((32, 8, 3, 3)), "W_h": np.ones((32, 8, 3, 3)), "b": np.zeros(32)}
    half = {
        name: torch.zeros(1, 8, 8, 8, dtype=torch.float16) for name in ("x", "h", "cell", "state_out", "cell_out", "y")
    }
    half["x"][0, 3, 4] = float("nan")
    packed = {name: torch.from_numpy(value) for name, value in pack(cell, weights).items()}
    steps.launch("lstm_step", cell, TILE, {**half, **packed}, size)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 3:6] = True
    for name in ("state_out", "cell_out", "y"):
        assert torch.equal(half[name][0].isnan().any(-1), expected), name
