"""A back end on a fake GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stepcell.runtime.backends.tensorrt.backend import TensorRTBackend
    from tests.fakes.fake_engine import Machine


@pytest.fixture(params=["graphs", "kernels", "fp16 mirrors"])
def machine(
    request: pytest.FixtureRequest, denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """A fake GPU with an engine: steps captured as CUDA graphs, or queued kernel by kernel, or captured in an
    engine that takes the fp16 mirror of its state.
    """
    from tests.fakes.fake_engine import Machine

    made = Machine(denoiser_onnx, tmp_path, monkeypatch, fp16_mirrors=request.param == "fp16 mirrors")
    made.engine.capturable = request.param != "kernels"
    return made


@pytest.fixture
def backend(machine: Machine) -> Iterator[TensorRTBackend]:
    """A back end on that machine, which must have freed everything at the end."""
    backend = machine.open()
    yield backend
    backend.close()
    assert not machine.engine.stale, f"{machine.engine.stale} values of a fp16 mirror were out of date"
    assert not machine.gpu.allocations, "memory that was never freed"
    assert not machine.gpu.live, "streams, events or graphs that were never closed"
