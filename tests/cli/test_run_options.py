"""Values of the options of `stepcell run`, and its signals."""

from __future__ import annotations

import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from stepcell.cli.clip_options import parse_rate
from stepcell.cli.common import parse_size
from stepcell.cli.run import parse_address
from stepcell.cli.signals import signal_control
from stepcell.errors import UsageError
from stepcell.runtime.media.open_source import open_source
from tests.cli.command import run
from tests.runtime.media.clips import timestamps, write_clip


@pytest.mark.parametrize("size", ["640", "640x", "x480", "0x480", "640X480", "-1x5", "640x480x3", "1e2x5"])
def test_refused_sizes(size: str) -> None:
    with pytest.raises(UsageError, match="--size: expected WIDTHxHEIGHT"):
        parse_size(size)


def test_sizes_and_rates() -> None:
    assert parse_size("640x480") == (640, 480)
    assert parse_rate("30000/1001") == Fraction(30000, 1001)


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [("9095", "127.0.0.1", 9095), ("0.0.0.0:9095", "0.0.0.0", 9095), ("[::1]:80", "::1", 80), ("0", "127.0.0.1", 0)],
)
def test_addresses(text: str, address: str, port: int) -> None:
    assert parse_address(text) == (address, port)


@pytest.mark.parametrize(
    "text", ["", "x", "65536", "host:", "-1", "1.5", "²", pytest.param("9" * 5000, id="5000 digits")]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics-port: expected"):
        parse_address(text)


def test_signals_stop_and_reset_a_run_and_the_old_handlers_come_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with signal_control() as control:
        signal.raise_signal(signal.SIGUSR1)
        assert (control.resets, control.stopping) == (1, False)
        signal.raise_signal(signal.SIGTERM)
        assert (control.stopping, control.aborting, control.signal) == (True, False, signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("a second signal does not wait")
    assert control.signal == signal.SIGINT
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_interrupt_of_something_else_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), signal_control():
        raise KeyboardInterrupt


def test_options_of_video_reach_the_run(accumulator: Callable[..., Path], tmp_path: Path) -> None:
    """`--resize` without a value takes the size of the model."""
    model = accumulator(shape=("batch", 3, 16, 24), range=(0.0, 1.0))
    clip = write_clip(tmp_path / "in.mkv", [np.full((8, 16, 3), 90, np.uint8)] * 3, milliseconds=[0, 40, 700])
    output = tmp_path / "out.mkv"
    result = run(model, "-i", clip, "-o", output, "--timestamps", "keep", "--on-size-change", "reset", "--resize")
    assert result.exit_code == 0, result.stderr
    assert "16x8 resized to 24x16" in result.stderr
    assert timestamps(output) == [0, 0.04, 0.7]
    assert next(iter(open_source(str(output)))).shape == (16, 24, 3)
    refused = run(model, "-i", clip, "-o", output, "--resize", "16", "--overwrite")
    assert (refused.exit_code, "--resize: expected WIDTHxHEIGHT" in refused.stderr) == (2, True)
    silent = run(model, "-i", clip, "-o", output, "--resize", "fit", "--audio", "copy", "--overwrite")
    assert (silent.exit_code, "has no sound to copy" in silent.stderr) == (1, True)
