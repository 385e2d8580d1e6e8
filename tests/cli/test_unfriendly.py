"""`stepcell run` under adverse conditions: full disks, odd names, closed pipes, silent cameras, repeated signals."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.overwrite import ARRAY_HEADER, MARK
from stepcell.runtime.media.open_source import open_source
from stepcell.runtime.media.video_reader import VideoSource
from tests.cli.command import run

Model = Callable[..., Path]
RUN = (sys.executable, "-c", "from stepcell.cli import main; main()", "run")
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
ENOUGH = 60.0  # seconds; on an idle machine every test takes less than one


def shell(text: str, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a shell command, in which `{}` is the run with these arguments."""
    command = shlex.join([*RUN, *map(str, arguments)])
    bash = ["bash", "-c", text.format(command)]
    done = subprocess.run(bash, stderr=subprocess.PIPE, timeout=ENOUGH, check=False, env=BUFFERED)
    said = done.stderr.decode()
    assert "Traceback" not in said, said
    return done.returncode, " ".join(said.split())


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (200, 9, 7, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("name", "most", "older"),
    [("out.npy", 6, False), ("out.mkv", 120, True), ("out.mp4", 120, False), ("out.mov", 120, True)],
)
def test_a_full_disk_costs_the_last_frames_only(
    accumulator: Model, tmp_path: Path, name: str, most: int, older: bool
) -> None:
    """A limit on the size of files acts like a full disk. `most`: largest number of frames lost."""
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), np.uint8))
    model, output, report = accumulator(range=(0.0, 1.0)), tmp_path / "outputs" / name, tmp_path / "run.json"
    output.parent.mkdir()
    if older:
        output.write_text(f"an older recording, {MARK}")
    limit = 4000 if name == "out.npy" else 200  # KiB
    arguments = [model, "-i", tmp_path / "clip.npy", "-o", output, "--reset-every", 1, "--report", report]
    code, said = shell(f"ulimit -f {limit}; {{}}", *arguments)
    assert code == 1
    found = np.load(output) if name == "out.npy" else np.stack(list(open_source(str(output))))
    summary = json.loads(report.read_text())
    if name == "out.npy":
        assert output.stat().st_size == ARRAY_HEADER + found.nbytes, "the part of a frame is cut off"
    assert 60 <= len(found) < summary["frames"] <= len(found) + most
    assert summary["written"] == len(found)
    rest = f"{output} holds the first {len(found)} of {summary['frames']} frames"
    rest += ", in place of an older file" * older
    assert f"error: {output}: cannot be written (File too large) ({rest}) hint: free some space there" in said
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_a_full_disk_costs_the_last_pictures_only(accumulator: Model, tmp_path: Path) -> None:
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    frames[25:] = np.random.default_rng(0).integers(0, 256, frames[25:].shape)
    np.save(tmp_path / "clip.npy", frames)
    outputs = tmp_path / "outputs"
    code, said = shell("ulimit -f 4; {}", accumulator(), "-i", tmp_path / "clip.npy", "-o", outputs, "--reset-every", 1)
    assert code == 1
    assert f"{outputs} holds the first 25 of " in said
    assert len(list(open_source(str(outputs)))) == len(list(outputs.iterdir())) == 25


@pytest.mark.parametrize("name", ["out.npy", "out.mkv", "out.mp4", "out"])
def test_a_disk_that_was_full_from_the_start_leaves_no_file(
    accumulator: Model, clip: Path, tmp_path: Path, name: str
) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "out.mp4").write_text(f"an older recording, {MARK}")
    code, said = shell("ulimit -f 0; {}", accumulator(range=(0.0, 1.0)), "-i", clip, "-o", outputs / name)
    assert code == 1
    assert said.count(f"{name}: cannot be written (File too large)") == 1
    assert "holds the" not in said
    assert [path.read_text() for path in outputs.iterdir()] == [f"an older recording, {MARK}"]


def test_a_report_that_cannot_be_written_does_not_hide_what_broke(accumulator: Model, tmp_path: Path) -> None:
    frames = np.zeros((9, 3, 8, 8), np.float32)
    frames[4] = np.nan
    np.save(tmp_path / "bad.npy", frames)
    model, report = accumulator(), tmp_path / "run.json"
    code, said = shell("ulimit -f 0; {}", model, "-i", tmp_path / "bad.npy", "--report", report)
    assert code == 1
    assert "run.json: cannot be written (File too large)" in said
    assert "error: " in said
    assert "NaN" in said.split("error: ")[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--fps", "1e99999999"],
        ["--fps", "1e-9"],
        ["--reset-gap", "nan"],
        ["--deadline-ms", "nan"],
        ["--reconnect", "nan"],
        ["--metrics-port", "9" * 5000],
    ],
    ids=lambda options: options[0] + " " + options[1][:10],
)
def test_numbers_that_are_none(accumulator: Model, clip: Path, options: list[str]) -> None:
    code, said = shell("{}", accumulator(), "-i", clip, *options)
    assert code == 2
    assert options[0] in said


def test_a_file_name_that_is_no_unicode(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.npy")
    clip.rename(odd)
    snapshot, report = tmp_path / "s.safetensors", tmp_path / "r.json"
    arguments = [accumulator(), "-i", odd, "-i", odd, "--snapshot", snapshot, "--report", report]
    assert shell("{}", *arguments, "--limit", 50)[0] == 0
    assert shell("{}", *arguments, "--resume")[0] == 0
    streams = json.loads(report.read_text())["streams"]
    assert [(stream["first_frame"], stream["frames"]) for stream in streams] == [(50, 150), (50, 150)]
    assert streams[0]["input"].endswith("\\udcff\n.npy")


def test_a_password_is_not_told(accumulator: Model, tmp_path: Path) -> None:
    url = "http://user:secret@127.0.0.1:1/x"
    arguments = [accumulator(), "-i", url, "--reconnect", "0.1", "--report", tmp_path / "r.json"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "http://***@127.0.0.1:1/x: lost" in " ".join(result.stderr.split())
    assert "secret" not in result.stderr + (tmp_path / "r.json").read_text()
    with pytest.raises(InputError) as failed:
        VideoSource(url)
    stack = "".join(traceback.format_exception(failed.value))
    assert "av.error" in stack
    assert "secret" not in stack


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("{} <&-", ["-i", "-", "--size", "7x9"], "stdin: is closed"),
        ("{} >&-", ["-i", "clip.npy", "-o", "-"], "stdout: is closed"),
        ("{}", ["-i", "x" * 300], "cannot be read (File name too long)"),
        ("{}", ["-i", "clip.npy", "-o", "x" * 300], "cannot be written (File name too long)"),
        ("ln -s round round; {}", ["-i", "round"], "round: cannot be read (Too many levels of symbolic links)"),
        ("ln -s round round; {}", ["-i", "clip.npy", "-o", "round"], "round: cannot be written"),
    ],
)
def test_what_cannot_be_opened(
    accumulator: Model, clip: Path, monkeypatch: pytest.MonkeyPatch, text: str, arguments: list[str], expected: str
) -> None:
    model = accumulator()
    monkeypatch.chdir(clip.parent)
    code, said = shell(text, model, *arguments)
    assert code == 1
    assert expected in said


def test_where_all_frames_are_late_that_is_said(accumulator: Model, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    arguments = ["-i", "-", "--size", "7x9", "--deadline-ms", "1e-6", "-o", tmp_path / "out.npy", "--report", report]
    code, said = shell("head -c 1890 /dev/zero | {}", accumulator(), *arguments)
    assert code == 1
    assert "stdin: all its 10 frames were dropped" in said
    assert sum(json.loads(report.read_text())["dropped"].values()) == 10
    assert not (tmp_path / "out.npy").exists()


class Silent:
    """A server that accepts connections, sends its words, and is silent from then on."""

    def __init__(self) -> None:
        self.words = b""
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.connected: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._server.accept()[0]
                connection.sendall(self.words)
                self.connected.append(connection)
            except OSError:
                return

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self.connected:
            connection.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + ENOUGH
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_cameras_that_do_not_answer_do_not_hold_up_a_stop(
    accumulator: Model, clip: Path, silent: Silent, tmp_path: Path
) -> None:
    """Opening a silent camera takes ten seconds; both are being opened when the signal arrives."""
    arguments = [accumulator(), "-i", silent.url, "-i", clip, "-i", silent.url, "--report", tmp_path / "r.json"]
    command = [*RUN, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: len(silent.connected) == 2)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=ENOUGH)
        assert time.monotonic() - started < 8
    assert process.returncode == 143, said
    streams = json.loads((tmp_path / "r.json").read_text())["streams"]
    assert [stream["stopped"] for stream in streams] == ["interrupted"] * 3


TAKEN_DOWN = "Python was taken down"
TELLING = f"import atexit, os; atexit.register(os.write, 2, b'{TAKEN_DOWN}'); from stepcell.cli import main; main()"


def test_a_usual_end_takes_python_down(accumulator: Model, clip: Path) -> None:
    command = [sys.executable, "-c", TELLING, "run", str(accumulator()), "-i", str(clip)]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=ENOUGH, check=True)
    assert TAKEN_DOWN in done.stderr.decode()


@pytest.mark.parametrize("source", ["url", "pipe"])
@pytest.mark.parametrize(
    ("end", "code"), [("limit", 0), ("output", 1), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_a_read_that_is_left_behind_does_not_crash_the_end(
    accumulator: Model, silent: Silent, camera: Any, tmp_path: Path, source: str, end: str | signal.Signals, code: int
) -> None:
    """FFmpeg may crash while the interpreter is finalised (one run in 25), so the process exits without finalising."""
    words, output, report = camera._data[: len(camera._data) // 2], tmp_path / "out.npy", tmp_path / "run.json"
    with av.open(io.BytesIO(words)) as container:
        count = sum(1 for _ in container.decode(video=0)) - 3  # so everything is read, and as many frames are queued
    name, silent.words = silent.url, words
    if source == "pipe":
        name = str(tmp_path / "pipe.ts")
        os.mkfifo(name)
    arguments = [accumulator(), "-i", name, "-o", output, "--report", report, "--json"]
    arguments += ["--limit", count] if end == "limit" else []
    command = [sys.executable, "-c", TELLING, "run", *map(str, arguments)]
    if end == "output":
        command = ["bash", "-c", f"ulimit -f {(count - 1) * 297 + 1}; {shlex.join(command)}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED) as process:
        try:
            pipe = os.open(name, os.O_WRONLY) if source == "pipe" else None
            if pipe is not None:
                os.write(pipe, words)  # stays open
            if isinstance(end, signal.Signals):
                until(lambda: any(path.stat().st_size > count * 297 * 1024 for path in tmp_path.glob(".out*.npy")))
                process.send_signal(end)
            said, errors = process.communicate(timeout=ENOUGH)
        finally:
            process.kill()
    if pipe is not None:
        os.close(pipe)
    assert process.returncode == code, errors.decode()
    assert TAKEN_DOWN not in errors.decode()
    assert ("error: " in errors.decode()) == (code == 1)
    summary = json.loads(report.read_text())
    assert summary == json.loads(said)
    assert summary["written"] == len(np.load(output)) >= count - 1
    assert sorted(path.suffix for path in tmp_path.glob("*out*")) == [".npy"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_waits_for_nothing(
    accumulator: Model, clip: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The reader of stdout has stopped, so after the first signal the run waits for its output."""
    np.save(clip, np.zeros((60, 144, 176, 3), np.uint8))
    report = tmp_path / "run.json"
    command = [sys.executable, "-c", TELLING, "run", str(accumulator(range=(0.0, 1.0))), "-i", str(clip), "-o", "-"]
    command += ["-i", str(clip), "-o", str(tmp_path / "out.npy"), "--report", str(report)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(number)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(ENOUGH) == code
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert TAKEN_DOWN not in said
    stuck, other = json.loads(report.read_text())["streams"]
    assert (stuck["written"], stuck["error"]) == (0, "stdout: not finished when the run was aborted")
    assert (other["written"], other["error"]) == (len(np.load(tmp_path / "out.npy")), None)


def test_a_demand_to_forget_that_comes_before_the_first_frame(accumulator: Model, silent: Silent) -> None:
    """`systemctl reload` while a camera is being opened must not end the service."""
    command = [*RUN, str(accumulator()), "-i", silent.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: silent.connected)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        code = process.wait(ENOUGH)
        assert process.stderr is not None
        assert code == 143, process.stderr.read().decode()


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&1 >/dev/null | head -c 1", "2>&-"])
def test_nobody_reads_what_is_said(where: str, accumulator: Model, clip: Path, tmp_path: Path) -> None:
    """A log on a full disk or without a reader does not end the run."""
    code, _ = shell(f"set -o pipefail; {{}} {where}", accumulator(), "-i", clip, "-o", tmp_path / "out.npy")
    assert code == 0
    assert len(np.load(tmp_path / "out.npy")) == 200


def test_a_result_for_a_closed_stdout(accumulator: Model, clip: Path) -> None:
    code, said = shell("{} >&-", accumulator(), "-i", clip, "--json")
    assert (code, "error: stdout: is closed" in said) == (1, True), said


def test_a_device_is_not_replaced_by_a_report(accumulator: Model, clip: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    result = run(accumulator(), "-i", clip, "--report", pipe)
    assert result.exit_code == 1
    assert "pipe.json: is a device or a pipe, expected the name of a file" in " ".join(result.stderr.split())
    assert pipe.is_fifo()
