"""`stepcell events`: what a file holds, drawn and printed; files that are broken, foreign or without a size."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from stepcell.cli import main
from stepcell.runtime.media.events import Events, write_dat
from stepcell.runtime.media.open_source import open_source

SIZE = (320, 200)


def events(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["events", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A bar that moves right by 200 pixels in 200 ms: it rises in front and falls behind."""
    t = np.repeat(np.arange(0, 200_000, 1000), 40)
    step, row = t // 1000, np.tile(np.arange(20), 400)
    rising = np.tile(np.repeat([True, False], 20), 200)
    write_dat(tmp_path / "bar.dat", [Events.of(step + np.where(rising, 50, 20), row + 90, rising, t)], SIZE)
    return tmp_path / "bar.dat"


def picture(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_what_a_file_holds(recording: Path) -> None:
    printed = events(recording)
    assert printed.exit_code == 0, printed.output
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in printed.stdout.splitlines() if line.strip()}
    assert lines["format"] == "format DAT"
    assert lines["sensor"] == "sensor 320x200, as the file says"
    assert lines["events"] == "events 8,000, 50% of them rising"
    assert lines["time"] == "time 0.199 s, from 0.000000 s to 0.199000 s of its clock"
    assert lines["rate"] == "rate 40,201 events/s"
    assert lines["bad events"] == "bad events none"
    report = json.loads(events(recording, "--json").stdout)
    assert (report["events"], report["rising"], report["largest_x"], report["end_us"]) == (8000, 4000, 249, 199_000)


def test_a_picture_shows_where_and_when(recording: Path, tmp_path: Path) -> None:
    result = events(recording, "--event-window", "10ms", "-o", tmp_path / "bar.png")
    assert result.exit_code == 0, result.output
    assert "windows of 10 ms at 0, 0.0378, 0.0756, 0.113, 0.151, 0.189 s" in result.stderr
    sheet = picture(tmp_path / "bar.png").astype(int)
    assert sheet.shape == (2 * 204 + 161, 3 * 320 + 8, 3)
    first = sheet[:200, :320]
    reddish, bluish = (first[..., one] > first[..., other] + 20 for one, other in ((0, 2), (2, 0)))
    assert np.flatnonzero(reddish.any(0)).tolist() == [*range(50, 60)]
    assert np.flatnonzero(bluish.any(0)).tolist() == [*range(20, 30)]
    assert np.flatnonzero(reddish.any(1)).tolist() == [*range(90, 110)]
    strip = sheet[-161:]
    assert (strip[:80, :, 0] > strip[:80, :, 2]).any()
    assert (strip[81:, :, 2] > strip[81:, :, 0]).any()


def test_a_clip_has_a_frame_for_each_window(recording: Path, tmp_path: Path) -> None:
    result = events(recording, "--event-window", "20ms", "-o", tmp_path / "bar.mp4")
    assert result.exit_code == 0, result.output
    clip = open_source(str(tmp_path / "bar.mp4"))
    frames = np.stack(list(clip)).astype(int)
    clip.close()
    assert (clip.fps, frames.shape) == (50, (10, 200, 320, 3))
    places = [np.flatnonzero(frame[100, :, 0] > frame[100, :, 2] + 40).mean() for frame in frames]
    assert np.diff(places) == pytest.approx(20, abs=2)


def test_a_sensor_that_the_file_does_not_state(tmp_path: Path) -> None:
    columns = {"x": [3, 5], "y": [2, 1], "p": [0, 1], "t": [10, 20]}
    np.savez(tmp_path / "e.npz", **{name: np.array(values) for name, values in columns.items()})
    printed = events(tmp_path / "e.npz", "-o", tmp_path / "e.png")
    assert printed.exit_code == 0, printed.output
    assert "not stated; events reach (5, 2), counted from 0" in " ".join(printed.stdout.split())
    assert picture(tmp_path / "e.png").shape == (3 * 40 + 4 + 161, 6 * 40, 3)
    assert "8x8, of --size" in events(tmp_path / "e.npz", "--size", "8x8").stdout
    assert json.loads(events(tmp_path / "e.npz", "--size", "4x4", "--json").stdout)["bad_events"]["outside"] == 1


def test_bad_events_are_counted(tmp_path: Path) -> None:
    t = np.arange(100) * 10
    t[[20, 60]] -= 35
    x = np.arange(100) % 16
    x[[5, 6, 7]] = 500
    write_dat(tmp_path / "e.dat", [Events.of(x, x * 0, x % 2, t)], (16, 16))
    result = events(tmp_path / "e.dat", "--json", "-o", tmp_path / "e.png")
    report = json.loads(result.stdout)
    assert (report["events"], report["bad_events"]) == (100, {"outside": 3, "back in time": 2})
    assert " ".join(result.stderr.split()).count("left out, as are all of this kind") == 2  # told once for each kind


def test_a_bad_event_does_not_stretch_the_time(tmp_path: Path) -> None:
    t = np.arange(100) * 10 + 10**15
    t[50] = 0
    x = np.arange(100) % 16
    x[99], t[99] = 500, 2 * 10**15
    np.savez(tmp_path / "e.npz", x=x, y=x * 0, p=x % 2, t=t)
    report = json.loads(events(tmp_path / "e.npz", "--size", "16x16", "--json").stdout)
    assert (report["start_us"], report["end_us"], report["seconds"]) == (10**15, 10**15 + 980, 980e-6)
    assert report["events_per_second"] == pytest.approx(98 / 980e-6)
    x[99] = 10**6  # no sensor is as wide, and the file states none
    np.savez(tmp_path / "e.npz", x=x, y=x * 0, p=x % 2, t=t)
    drawn = events(tmp_path / "e.npz", "-o", tmp_path / "e.png")
    assert (drawn.exit_code, "events reach (15, 0)" in drawn.stdout) == (0, True), drawn.output
    np.savez(tmp_path / "e.npz", x=x + 20, y=x, p=x % 2, t=t)
    wrong = events(tmp_path / "e.npz", "--size", "16x16")
    assert (wrong.exit_code, "all of its 100 events are outside a sensor of 16x16" in wrong.stderr) == (1, True)


def test_a_broken_file_is_described_up_to_there(recording: Path, tmp_path: Path) -> None:
    recording.write_bytes(recording.read_bytes()[:-3])
    result = events(recording, "--json", "-o", tmp_path / "bar.png")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["events"] == 7999
    assert "truncated: ends 5 bytes into a record" in report["broken"]
    assert "truncated: ends 5 bytes into a record" in " ".join(result.stderr.split())
    assert (tmp_path / "bar.png").exists()


@pytest.mark.parametrize("wrong", [17 * 10**17, -(2**63)])
def test_times_that_run_refuses_are_not_described(tmp_path: Path, wrong: int) -> None:
    """Nanoseconds since 1970, and an unsigned time that does not fit."""
    t = np.arange(9)
    np.savez(tmp_path / "e.npz", x=t, y=t, p=t % 2, t=np.where(t < 6, t, wrong))
    result = events(tmp_path / "e.npz", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["events"], report["end_us"]) == (1, 6, 5)
    assert "event 6: expected a time within" in report["broken"]
    np.savez(tmp_path / "all.npz", x=t, y=t, p=t % 2, t=t + wrong)
    assert "event 0: expected a time within" in " ".join(events(tmp_path / "all.npz").stderr.split())


def test_nothing_is_overwritten(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"a picture")
    assert events(recording, "-o", tmp_path / "holiday.png").exit_code == 2
    assert (tmp_path / "holiday.png").read_bytes() == b"a picture"
    assert events(recording, "-o", tmp_path / "holiday.png", "--overwrite").exit_code == 0
    assert events(recording, "-o", tmp_path / "holiday.png").exit_code == 0  # its own picture
    assert picture(tmp_path / "holiday.png").shape[2] == 3
    (tmp_path / "link.png").symlink_to(recording)
    before = recording.read_bytes()
    assert events(recording, "-o", tmp_path / "link.png", "--overwrite").exit_code == 2
    assert recording.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "e.gif"], 2, "expected .png"),
        (["--event-window", "500events"], 2, "expected a time"),
        (["--event-window", "999us", "-o", "e.mp4"], 2, "at most 1000 frames a second"),
        (["--size", "640"], 2, "expected WIDTHxHEIGHT"),
        (["--size", "640x480"], 1, "its sensor is 320x200"),
    ],
)
def test_what_does_not_fit(arguments: list[str], code: int, message: str, recording: Path) -> None:
    result = events(recording, *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())


def test_no_events(tmp_path: Path) -> None:
    (tmp_path / "e.raw").write_bytes(b"% evt 3.0\n% end\n")
    assert "contains no event" in events(tmp_path / "e.raw").stderr
    assert events(tmp_path / "missing.raw").exit_code == 1
    assert "expected .dat" in " ".join(events(tmp_path / "e.xyz").stderr.split())


@pytest.mark.parametrize("stream", ["-", "tcp://127.0.0.1:9000"])
def test_a_stream_has_no_end(stream: str) -> None:
    result = events(stream)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "`stepcell run` takes it" in result.stderr
