"""Streams of a run that are stepped on a server, against the same run here: real tables and clients, no network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from stepcell.contract import StepContract
from stepcell.errors import StepcellError
from stepcell.runtime.remote.server_stepper import ServerStepper
from stepcell.runtime.serving import client as client_module
from stepcell.runtime.serving.client import StreamClient
from stepcell.runtime.serving.client_contract import client_contract
from stepcell.runtime.serving.protocol import FrameRequest, NotAnswered
from stepcell.runtime.streams.report import RunError, RunReport
from stepcell.runtime.streams.run import run_streams
from stepcell.runtime.streams.run_control import RunControl
from tests.fakes.frame_source import FrameSource
from tests.runtime.serving.network import Network
from tests.runtime.serving.serving_model import order_model

SIZE = (2, 4, 3)
WriteModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE", 0.01)


@pytest.fixture
def model(tmp_path: Path, write_model: WriteModel) -> Path:
    return order_model(tmp_path / "order.onnx", write_model)


@pytest.fixture
def overflowing(tmp_path: Path, write_model: WriteModel) -> Path:
    """y = h' = 1e20 h + x: the third frame after a reset is Inf."""
    nodes = [
        helper.make_node("Mul", ["state_in.h", "factor"], ["grown"]),
        helper.make_node("Add", ["grown", "x"], ["y"]),
        helper.make_node("Identity", ["y"], ["state_out.h"]),
    ]
    factor = numpy_helper.from_array(np.array(1e20, np.float32), "factor")

    def write(path: Path, contract: StepContract, *_: object, **__: object) -> Path:
        return write_model(path, contract, nodes, initializer=[factor])

    return order_model(tmp_path / "overflows.onnx", write)


class Kept:
    """A sink that keeps its frames."""

    replaces, takes_pixels = False, True

    def __init__(self, *, takes_pixels: bool = True) -> None:
        self.name, self.takes_pixels = "kept", takes_pixels
        self.frames: list[NDArray[Any]] = []

    def write(self, frame: NDArray[Any]) -> None:
        self.frames.append(frame.copy())

    def close(self) -> None: ...

    def salvage(self) -> int:
        return len(self.frames)

    def abandon(self) -> None: ...


def clip(seed: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (count, *SIZE), np.uint8)


def sources(clips: dict[str, Any], **options: Any) -> list[FrameSource]:
    return [FrameSource(name, list(frames), **options) for name, frames in clips.items()]


def stepper(network: Network, control: RunControl | None = None, wait: float = 30.0, **options: Any) -> ServerStepper:
    return ServerStepper(
        lambda tell: StreamClient("", "", transport=network, on_event=tell, deadline=wait, **options),
        client_contract(network.loop.contract, network.wire),
        name="order",
        description="a network",
        gives_pixels=network.pixels,
        control=control or RunControl(),
    )


def finished(model: object, clips: dict[str, Any], *, takes_pixels: bool = True, **options: Any) -> tuple[Any, ...]:
    """Frames of each output, and the report; of a run that fails too."""
    sinks = [Kept(takes_pixels=takes_pixels) for _ in clips]
    try:
        report = run_streams(model, sources(clips), sinks, **options)  # type: ignore[arg-type]
    except RunError as error:
        report = error.report
    return [sink.frames for sink in sinks], report


def here(model: Path, clips: dict[str, Any], **options: Any) -> tuple[Any, RunReport]:
    return finished(model, clips, backend="onnxruntime", threads=1, **options)  # type: ignore[return-value]


def equal(found: list[list[NDArray[Any]]], wanted: list[list[NDArray[Any]]]) -> bool:
    return [len(each) for each in found] == [len(each) for each in wanted] and all(
        np.array_equal(one, other)
        for stream, others in zip(found, wanted, strict=True)
        for one, other in zip(stream, others, strict=True)
    )


@pytest.mark.parametrize("pixels", [True, False])
def test_streams_are_those_of_a_run_here(model: Path, pixels: bool) -> None:
    """Of pixels and of tensors, with resets, on a server that has a slot for each stream and no more."""
    clips = {"a": clip(0, 30), "b": clip(1, 17)}
    wanted, _ = here(model, clips, reset_every=7, takes_pixels=pixels)
    network = Network(model, None, pixels=pixels)
    found, report = finished(stepper(network), clips, reset_every=7, takes_pixels=pixels)
    assert equal(found, wanted)
    assert [(each.frames, each.resets["every"], each.error) for each in report.streams] == [
        (30, 4, None),
        (17, 2, None),
    ]
    assert not any(any(each.server_events.values()) for each in report.streams)
    assert (report.streams[0].device, report.streams[0].step.count) == ("server", 29)
    assert len(network.table) == 0, "every slot is free again"


@pytest.mark.parametrize("pixels", [True, False])
def test_a_bad_network_and_killed_servers_are_in_the_report_and_not_in_the_outputs(
    model: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, pixels: bool
) -> None:
    clips = {"a": clip(0, 80), "b": clip(1, 60)}
    wanted, _ = here(model, clips, takes_pixels=pixels)
    network = Network(model, tmp_path / "s", pixels=pixels, hurt=0.1)
    found, report = finished(stepper(network), clips, takes_pixels=pixels)
    assert equal(found, wanted)
    for each in report.streams:
        assert each.server_events["unreachable"] > 0
        assert each.server_events["replayed"] == each.server_events["resumed"] + each.server_events["restarted"] > 0
    assert "a: frame " in logged.text
    assert "the state is as it was: sent again, frames" in logged.text


def test_a_stream_without_a_slot_does_not_stop_the_others(model: Path) -> None:
    clips = {"a": clip(0, 12), "b": clip(1, 12), "c": clip(2, 12)}
    found, report = finished(stepper(Network(model, None, pixels=True, slots=2)), clips)
    assert sorted(len(frames) for frames in found) == [0, 12, 12]
    (error,) = [each.error for each in report.streams if each.error]
    assert "FULL: all 2 slots are in use" in error


@pytest.mark.parametrize("policy", ["stop", "reset", "ignore"])
def test_pixels_that_are_inf_are_treated_as_here(overflowing: Path, policy: str) -> None:
    clips = {"a": clip(0, 8)}
    wanted, local = here(overflowing, clips, on_nonfinite=policy)
    found, report = finished(stepper(Network(overflowing, None, pixels=True)), clips, on_nonfinite=policy)
    assert equal(found, wanted)
    one, other = report.streams[0], local.streams[0]
    assert (one.frames, one.non_finite, one.resets, one.error) == (
        other.frames, other.non_finite, other.resets, other.error
    )  # fmt: skip
    assert one.frames == (8 if policy == "reset" else 2)


def test_a_state_that_is_lost_for_good_ends_the_stream_with_its_frames_kept(model: Path) -> None:
    network = Network(model, None, pixels=True)
    clips = {"a": clip(0, 20)}
    wanted, _ = here(model, clips)

    class Killed(FrameSource):
        def __iter__(self) -> Any:
            for number, frame in enumerate(super().__iter__()):
                while number == 12 and network.table.counts.frames < 12:
                    time.sleep(0.001)
                if number == 12:
                    network.restart()
                yield frame

    sink = Kept()
    with pytest.raises(RunError, match="STATE_LOST") as raised:
        run_streams(stepper(network, replay=4), Killed("a", list(clips["a"])), sink)
    assert "triton-repo --snapshots" in (raised.value.hint or "")
    assert equal([sink.frames], [wanted[0][:12]])
    assert raised.value.report.streams[0].server_events["lost"] == 1


class Away(Network):
    """A server that is away after some frames."""

    control: RunControl | None = None  # is asked to stop then

    def infer(self, request: FrameRequest) -> dict[str, Any]:
        if request.number == 5:
            if self.control is not None:
                self.control.stop()
            raise NotAnswered("connection refused")
        return super().infer(request)


def test_a_server_that_stays_away_ends_the_stream(model: Path) -> None:
    with pytest.raises(RunError, match="connection refused") as raised:
        run_streams(stepper(Away(model, None, pixels=True), wait=0.1), sources({"a": clip(0, 9)}), Kept())
    assert raised.value.report.streams[0].frames == 5


def test_a_stop_does_not_wait_for_a_server_that_is_away(model: Path) -> None:
    network, control, sink = Away(model, None, pixels=True), RunControl(), Kept()
    network.control = control
    started = time.monotonic()
    report = run_streams(stepper(network, control, wait=300.0), sources({"a": clip(0, 9)}), sink, control=control)
    assert time.monotonic() - started < 100
    assert (report.streams[0].stopped, report.streams[0].error, len(sink.frames)) == ("interrupted", None, 5)


def test_an_answer_of_another_kind_is_refused(model: Path) -> None:
    class Wrong(Network):
        def infer(self, request: FrameRequest) -> dict[str, Any]:
            return {name: array.astype(np.int32) for name, array in super().infer(request).items()}

    with pytest.raises(RunError, match=r"y: the server's model answers .* uint8, got .* int32"):
        run_streams(stepper(Wrong(model, None, pixels=True)), sources({"a": clip(0, 3)}), Kept())


def test_states_are_not_written_here(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StepcellError, match="--snapshot: is of states on this machine"):
        run_streams(stepper(Network(model, None)), sources({"a": clip(0, 3)}), snapshot=tmp_path / "s.safetensors")
