"""Simulated events of a real clip, through a file and an event model."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from stepcell import StepLoop
from stepcell.cli import main
from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import ContractError, InputError, UsageError
from stepcell.event_spec import EventSpec
from stepcell.exporter import FAMILIES, export_onnx
from stepcell.models.published.e2vid import E2VIDRecurrent, FireNet
from stepcell.models.published.openeb_networks import EventToVideo
from stepcell.models.published.openeb_networks import FireNet as CornerFireNet
from stepcell.runtime.media.events import Events, EventSource, event_tensor, simulate_events, write_dat
from stepcell.runtime.media.open_sink import open_sink
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.preprocess import Preprocessor, event_input
from stepcell.runtime.streams.run import run_streams

SIZE = (176, 144)
FRAMES, FPS = 40, 30


@pytest.fixture(scope="session")
def clip(clip_path: Path) -> NDArray[np.uint8]:
    source = open_source(str(clip_path))
    frames = np.stack([frame for frame, _ in zip(source, range(FRAMES), strict=False)])
    source.close()
    return frames


@pytest.fixture(scope="session")
def events(clip: NDArray[np.uint8]) -> Events:
    return Events.join(list(simulate_events(clip, FPS)))


@pytest.fixture(scope="session")
def dat(events: Events, exported: Path) -> Path:
    write_dat(exported / "events.dat", [events], SIZE)
    return exported / "events.dat"


@pytest.fixture(scope="session")
def e2vid_onnx(exported: Path) -> Path:
    """Random weights, float16, sizes multiples of 4; windows of 50 ms."""
    torch.manual_seed(0)
    model = E2VIDRecurrent(3, 4, num_encoders=2, num_residual_blocks=1, event_window="50ms").eval()
    export_onnx(model, exported / "e2vid.onnx", family="e2vid_recurrent")
    return exported / "e2vid.onnx"


def events_of(path: Path, window: str | None = None) -> EventSpec:
    with StepLoop.open(path) as loop:
        found = event_input(loop.contract.inputs[0], window)
    assert found is not None
    return found


def test_the_simulator_follows_the_brightness(clip: NDArray[np.uint8], events: Events) -> None:
    """The sum of a pixel's events times the threshold is the change of its log intensity."""
    assert (np.diff(events.t) >= 0).all()
    assert 0 <= events.t[0] <= events.t[-1] <= (FRAMES - 1) * 1e6 / FPS
    moved = np.zeros((SIZE[1], SIZE[0]))
    np.add.at(moved, (events.y, events.x), np.where(events.p, 0.2, -0.2))
    first, last = (np.log(frame @ [0.299, 0.587, 0.114] / 255 + 0.02) for frame in (clip[0], clip[-1]))
    worst = float(np.abs(last - first - moved).max())
    assert worst < 0.2 + 1e-9, f"a pixel is {worst:.3f} off, more than one event"
    assert len(events) > 20_000, "a clip in which nothing moves proves nothing"


def test_a_ramp_gives_events_at_even_times() -> None:
    levels = np.exp(np.array([0.0, 1.0])) * 0.1 - 0.02
    frames = (levels * 255)[:, None, None, None]
    (part,) = simulate_events(frames, 10, threshold=0.3)
    assert part.t == pytest.approx([30_000, 60_000, 90_000], abs=1)
    assert part.p.all()


def test_from_clip_to_steps(events: Events, dat: Path, firenet_onnx: Path) -> None:
    """Steps from the file equal steps of tensors made in the test."""
    spec = events_of(firenet_onnx)
    count = int(0.35 * SIZE[0] * SIZE[1])
    source = open_source(str(dat), channels=5, events=spec)
    sink = open_sink(str(dat.with_name("out.npy")), Fraction(25))
    with StepLoop.open(firenet_onnx) as loop:
        report = run_streams(loop, source, sink).streams[0]
        assert report.frames == len(events) // count >= 8
        assert report.frame_size == SIZE
        results = np.load(dat.with_name("out.npy"))
        loop.reset()
        for number, result in enumerate(results):
            part = events[number * count : (number + 1) * count]
            expected = loop.step(x=event_tensor(part, spec, SIZE[1], SIZE[0])[None])["y"][0]
            assert np.isfinite(expected).all()
            worst = float(np.abs(expected - result).max())
            assert worst == 0, f"step {number}: worst difference {worst:.1e}"
    assert len(results) == report.frames
    assert float(np.abs(np.diff(results, axis=0)).max()) > 1e-3, "every frame is alike"


def test_padded_and_cropped_to_a_video_by_time(dat: Path, e2vid_onnx: Path, tmp_path: Path) -> None:
    """A sensor of 174x142 is padded with zeros to multiples of four; the frame rate is that of the windows."""
    source = open_source(str(dat), events=events_of(e2vid_onnx))
    assert source.fps == 20
    parts = list(source)
    source.close()
    seconds = (FRAMES - 1) / FPS
    assert abs(len(parts) - seconds * 20) <= 1
    np.savez(tmp_path / "cut.npz", **_cropped(dat))
    spec = events_of(e2vid_onnx)
    with StepLoop.open(e2vid_onnx) as loop:
        cut = open_source(str(tmp_path / "cut.npz"), events=spec, size=(174, 142))
        report = run_streams(loop, cut, open_sink(str(tmp_path / "out.mp4"), cut.fps or Fraction(1))).streams[0]
        with contextlib.closing(EventSource(tmp_path / "cut.npz", spec, (174, 142))) as again:
            tensor = next(iter(again))
        padded = Preprocessor(loop.contract.inputs[0], tensor)(tensor)
    assert report.frame_size == (174, 142)
    assert padded.shape == (1, 3, 144, 176)
    assert np.array_equal(padded[0, :, :142, :174], tensor.astype(padded.dtype))
    assert not padded[0, :, 142:].any()
    assert not padded[0, :, :, 174:].any()
    video = open_source(str(tmp_path / "out.mp4"))
    assert video.fps == 20
    assert np.stack(list(video)).shape == (report.frames, 142, 174, 3)
    video.close()


def _cropped(path: Path) -> dict[str, NDArray[np.generic]]:
    from stepcell.runtime.media.events.formats import open_events

    reader = open_events(path)
    events = Events.join(list(reader))
    reader.close()
    keep = (events.x < 174) & (events.y < 142)
    return {name: getattr(events, name)[keep] for name in "xypt"}


def test_a_window_of_its_own(dat: Path, firenet_onnx: Path) -> None:
    spec = events_of(firenet_onnx, "5ms")
    source = open_source(str(dat), events=spec)
    assert source.fps == 200
    frames = iter(source)
    start = None
    for number in range(20):
        next(frames)
        start = start if start is not None else source.seconds
        assert source.seconds == pytest.approx(start + number * 0.005)
    source.close()
    with contextlib.closing(EventSource(dat, events_of(firenet_onnx, "100us"))) as short:
        assert short.fps is None  # a video has at most 1000 frames per second


def test_what_does_not_fit_is_refused(dat: Path, firenet_onnx: Path, denoiser_onnx: Path, clip_path: Path) -> None:
    spec = events_of(firenet_onnx)
    with pytest.raises(InputError, match="the model takes events"):
        open_source(str(clip_path), events=spec)
    with pytest.raises(InputError, match="the model takes pictures"):
        open_source(str(dat))
    with pytest.raises(InputError, match="sensor is 176x144, --size says 10x10"):
        open_source(str(dat), events=spec, size=(10, 10))
    with (
        contextlib.closing(EventSource(dat, events_of(firenet_onnx, "100000000events"))) as source,
        pytest.raises(InputError, match="fewer events than one window of 1e\\+08 events"),
    ):
        next(iter(source))
    with StepLoop.open(denoiser_onnx) as loop, pytest.raises(UsageError, match="takes pictures, not events"):
        event_input(loop.contract.inputs[0], "5ms")
    with StepLoop.open(firenet_onnx) as loop, pytest.raises(InputError, match="5 channels; got pixels"):
        Preprocessor(loop.contract.inputs[0], np.zeros((8, 8, 3), np.uint8))


def test_a_file_without_a_size_asks_for_it(tmp_path: Path, dat: Path, firenet_onnx: Path) -> None:
    np.savez(tmp_path / "e.npz", **_cropped(dat))
    with pytest.raises(UsageError, match="does not state the size of its sensor") as error:
        EventSource(tmp_path / "e.npz", events_of(firenet_onnx))
    assert error.value.hint is not None
    assert "--size" in error.value.hint


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (FireNet(5, 8), "voxel_grid of 5 bins as of E2VID, signed, normalised, 0.35 events/pixel a step"),
        (
            E2VIDRecurrent(5, 4, event_window="20000events"),
            "voxel_grid of 5 bins as of E2VID, signed, normalised, 20000 events a step",
        ),
        (EventToVideo(10, 1), "event_volume of 10 bins as of OpenEB, signed, 30000 us a step"),
        (CornerFireNet(10), "event_volume of 10 bins as of OpenEB, signed, 5000 us a step"),
    ],
)
def test_what_the_families_take(model: FireNet, text: str) -> None:
    assert str(model.inputs[0].events) == text


def test_the_convention_is_chosen_at_export(tmp_path: Path) -> None:
    settings = ["--set", "num_bins=5", "--set", "base_num_channels=4"]
    wanted = ["export", "--module", "stepcell.models.published.e2vid:FireNet", *settings]
    wanted += ["-o", str(tmp_path / "f.onnx"), "--shape", "x:1x5x24x32"]
    result = CliRunner().invoke(main, [*wanted, "--set", "events.convention=tonic"])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "f.onnx")])
    assert "voxel_grid of 5 bins as of tonic, signed, normalised" in " ".join(shown.stdout.split())
    with StepLoop.open(tmp_path / "f.onnx") as loop:
        assert StepContract.from_json(loop.contract.to_json()) == loop.contract
    refused = CliRunner().invoke(main, [*wanted, "--set", "events.convention=other"])
    assert refused.exit_code == 2
    assert "expected published or tonic, got other" in refused.output


@pytest.mark.parametrize("family", ["e2vid_firenet", "e2vid_recurrent", "openeb_firenet", "openeb_event_to_video"])
def test_the_window_is_an_argument_of_the_family(family: str) -> None:
    first = {"e2vid_firenet": {"num_bins": 5}, "e2vid_recurrent": {"num_bins": 5}, "openeb_firenet": {}}
    arguments = first.get(family, {"in_channels": 5, "out_channels": 1})
    assert "event_window" in FAMILIES[family].arguments
    spec = FAMILIES[family].build(**arguments, event_window="7ms").inputs[0]  # type: ignore[union-attr, index]
    assert str(spec.events.window) == "7000 us"


def test_the_contract_carries_it(firenet_onnx: Path, e2vid_onnx: Path, denoiser_onnx: Path) -> None:
    with StepLoop.open(firenet_onnx) as loop:
        contract = loop.contract
    assert StepContract.from_json(contract.to_json()) == contract
    document = msgspec.json.decode(contract.to_json())["inputs"][0]["events"]
    assert document == {
        "representation": "voxel_grid",
        "bins": 5,
        "polarity": "signed",
        "window": {"size": 0.35, "unit": "events/pixel"},
        "normalise": True,
    }
    with StepLoop.open(denoiser_onnx) as loop:
        assert '"events"' not in loop.contract.to_json()  # the contract of a picture model does not change
    result = CliRunner().invoke(main, ["inspect", str(e2vid_onnx)])
    assert result.exit_code == 0
    assert "voxel_grid of 3 bins as of E2VID, signed, normalised, 50000 us a step" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ("batch", 4, "height", "width")}, "5 bins with polarity signed make 5 channels, the shape has 4"),
        ({"layout": None}, "events need floats of layout NCHW"),
        ({"dtype": "uint8"}, "events need floats"),
        ({"polarity": "split"}, "make 10 channels"),
        ({"bins": 0}, "0 bins"),
        ({"size": 0.0}, "a window above zero"),
        ({"unit": "years"}, "Invalid enum value 'years'"),
        ({"representation": "image"}, "Invalid enum value 'image'"),
        ({"representation": "histogram", "normalise": False, "convention": "tonic"}, "tonic's convention"),
    ],
)
def test_a_contract_that_contradicts_itself(change: dict[str, object], message: str) -> None:
    spec = FireNet(5, 8).inputs[0]
    whole = StepContract(inputs=(spec,), outputs=(TensorSpec(name="y", shape=("batch", 1)),), states=())
    document = msgspec.json.decode(whole.to_json())
    entry = document["inputs"][0]
    for place in (entry, entry["events"], entry["events"]["window"]):
        place.update({key: value for key, value in change.items() if key in place})
    entry["events"] |= {"convention": change["convention"]} if "convention" in change else {}
    with pytest.raises(ContractError, match=message):
        StepContract.from_json(msgspec.json.encode(document))
