"""Memory that runs out ends a run with exit code 6, what was asked for, and a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepcell.cli import main
from stepcell.errors import DeviceError, InputError
from stepcell.library_errors import as_stepcell_error, is_out_of_memory
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.npy_file import ArraySink
from stepcell.runtime.streams.report import RunError
from stepcell.runtime.streams.run import run_streams
from tests.fakes.frame_source import FrameSource

Model = Callable[..., Path]
ONE = np.ones((3, 8, 8), np.float32)
ASKED = "Unable to allocate 9.31 GiB for an array with shape (50000, 50000)"


class Full(ArraySink):
    def write(self, frame: Any) -> None:
        raise MemoryError(ASKED)


@pytest.mark.parametrize("where", ["source", "sink", "step"])
def test_a_run_ends_with_what_was_asked_for(
    accumulator: Model, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[Any] = [ONE, MemoryError(ASKED)] if where == "source" else [ONE] * 3
    sink = Full(tmp_path / "a.npy") if where == "sink" else ArraySink(tmp_path / "a.npy")
    with StepLoop.open(accumulator()) as loop:
        if where == "step":

            def fail(**_: Any) -> Any:
                raise MemoryError(ASKED)

            monkeypatch.setattr(loop, "step_async", fail)
        with pytest.raises(RunError, match=r"not enough memory: Unable to allocate 9\.31 GiB") as failed:
            run_streams(loop, FrameSource("frames", frames), sink)
    assert failed.value.exit_code == 6
    assert failed.value.report.streams[0].stopped == "error"


@pytest.mark.parametrize(
    "text",
    [
        "std::bad_alloc",
        "bad allocation",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer of size 2304000000",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[Errno 12] Cannot allocate memory",
    ],
)
def test_every_library_is_understood(text: str) -> None:
    error = as_stepcell_error(RuntimeError(text), "m.onnx", InputError)
    assert isinstance(error, DeviceError)
    assert text in error.message
    assert not is_out_of_memory(ValueError("cannot reshape array"))


def test_the_command_line_shows_no_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    for error, code, message in (
        (MemoryError(ASKED), 6, "not enough memory: Unable to allocate"),
        (TypeError("nothing to see"), 1, "fault of stepcell: TypeError: nothing to see"),
        (OSError(28, "No space left on device", "rtsp://u:sEcReT@host"), 1, "***@host: No space left on device"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("stepcell.onnx_model.read_model", fail)
        result = CliRunner().invoke(main, ["inspect", str(path)])
        assert result.exit_code == code, result.output
        assert message in result.output
        assert "Traceback" not in result.output
        assert "sEcReT" not in result.output
