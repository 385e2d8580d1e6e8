"""What is done to a Ray cluster while it runs clips."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from stepcell.runtime.media.video_writer import VideoSink
from tools.fleet.outcome import Outcome
from tools.fleet.ray_nodes import ADDRESS, Nodes, kill_node_of, nodes, processes, wait_for_clip, workers

FRAMES, LONG = 24, 400
AGAIN = "it is run again after the others"
WHOLE = "outputs are those of the local pool, byte by byte, and whole or not there"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    report: dict[str, Any]
    said: str


class CorpusScenarios:
    """Each method is one scenario.

    Args:
        model: the denoiser, float32, for any size.
        folder: for clips, outputs and Ray's files; a short path.
        count: clips.
    """

    def __init__(self, model: Path, folder: Path, count: int) -> None:
        self.model, self.folder, self.count = model, folder, count
        self.clips = folder / "clips"
        self.clips.mkdir()
        for number in range(count):
            write_clip(self.clips / f"{number:02d}.mp4", number, FRAMES)
        self.local = folder / "local"
        self._end(self._start("local", None))
        self.wanted = digests(self.local)

    def equal(self) -> Outcome:
        """A corpus on three nodes, twice."""
        outcome = Outcome("three nodes", f"{WHOLE}; a second call runs nothing")
        out, seen = self.folder / "equal", set[int]()
        with self._nodes(1, 1, 1) as cluster:
            raylets = {cluster.raylet(last): last for last in (2, 3, 4)}
            process = self._start("equal", ADDRESS)
            while process.poll() is None:
                seen |= {raylets[raylet] for raylet in raylets if workers(raylet)}
                time.sleep(0.1)
            first = self._end(process)
            made = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
            second = self._end(self._start("equal", ADDRESS))
        self._require_whole(outcome, "equal", first)
        outcome.require(seen == {2, 3, 4}, f"workers ran on nodes {seen}")
        outcome.require(second.code == 0 and second.report["finished_before"] == self.count, f"second: {second}")
        after = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
        outcome.require(made == after, "the second call changed files")
        outcome.require(records(out) == records(self.local), "records differ from those of the local pool")
        outcome.seen = (
            f"{first.report['made']} clips made on nodes {sorted(seen)}, digests and records equal; second call: "
            f"{second.report['made']} made, {second.report['finished_before']} finished before"
        )
        return outcome

    def worker_killed(self) -> Outcome:
        """SIGKILL of a worker in the middle of a clip."""
        outcome = Outcome("a worker killed", f"{WHOLE}; its clip is run once more")
        with self._long_clip() as long, self._nodes(1, 1, 1):
            process = self._start("worker", ADDRESS)
            os.kill(wait_for_clip(name=long), signal.SIGKILL)
            ended = self._end(process)
        outcome.require(ended.report.get("made") == self.count + 1, f"{ended.report}")
        self._require_made(outcome, "worker", ended)
        self._require_once_more(outcome, ended, 1)
        return outcome

    def raylet_killed(self) -> Outcome:
        """SIGKILL of a node; its worker goes on until Ray has noticed, and may end its clip in that time."""
        outcome = Outcome("a raylet killed", WHOLE)
        with self._long_clip() as long, self._nodes(0, 1, 1):  # the command is on the first node
            process = self._start("raylet", ADDRESS)
            kill_node_of(wait_for_clip(name=long))
            ended = self._end(process)
        outcome.require(ended.report.get("made") == self.count + 1, f"{ended.report}")
        self._require_made(outcome, "raylet", ended)
        again = "; ".join(run_again(ended)) or "its worker ended its clip"
        outcome.seen = f"{ended.report.get('made')} made, digests equal; {again}"
        return outcome

    def machine_lost(self) -> Outcome:
        """A node and its worker that no longer answer; the worker comes back when its clip was made elsewhere."""
        outcome = Outcome("a node that is lost and comes back", f"{WHOLE}; its clip is run once more on another node")
        with self._long_clip() as long, self._nodes(0, 1, 1):
            process = self._start("lost", ADDRESS)
            worker = wait_for_clip(name=long)
            os.kill(worker, signal.SIGSTOP)
            kill_node_of(worker)
            ended = self._end(process)
            made = digests(self.folder / "lost")
            os.kill(worker, signal.SIGCONT)
            outcome.require(self._no_workers(), "the worker that came back goes on")
            outcome.require(digests(self.folder / "lost") == made, "the worker that came back changed an output")
        outcome.require(ended.report.get("made") == self.count + 1, f"{ended.report}")
        self._require_made(outcome, "lost", ended)
        self._require_once_more(outcome, ended, 1)
        return outcome

    def killed_twice(self) -> Outcome:
        """A clip whose worker is killed each time that it runs."""
        outcome = Outcome("a clip whose worker is killed twice", "it is listed, exit code 1, and the others are made")
        with self._long_clip() as long, self._nodes(1, 1, 1):
            process = self._start("twice", ADDRESS)
            first = wait_for_clip(name=long)
            os.kill(first, signal.SIGKILL)
            os.kill(wait_for_clip(name=long, other_than=first), signal.SIGKILL)
            ended = self._end(process)
        failed = ended.report["failed"]
        outcome.require(ended.code == 1 and len(failed) == 1, f"exit code {ended.code}, failed {failed}")
        outcome.require("twice" in str(failed) and long in str(failed), f"{failed}")
        self._require_made(outcome, "twice", ended)
        self._require_once_more(outcome, ended, 1)
        outcome.seen = f"{ended.report['made']} made; {failed[0]['error'] if failed else ''}"
        return outcome

    def not_shared(self) -> Outcome:
        """Nodes that do not see a clip, the outputs or the model."""
        outcome = Outcome(
            "folders that a node does not see", "the clip's error names the node; without outputs, an end"
        )
        hidden = self.clips / "hidden"
        hidden.mkdir()
        shutil.copy(self.clips / "00.mp4", hidden / "h.mp4")
        with self._nodes(0) as cluster:
            cluster.start(3, hidden=hidden)
            ended = self._end(self._start("hidden", ADDRESS, pattern="**/*.mp4"))
            outcome.require(ended.code == 1, f"exit code {ended.code}: {ended.said[-500:]}")
            failed = ended.report.get("failed", [])
            said = failed[0]["error"] if failed else ""
            outcome.require(len(failed) == 1 and "on node 127.0.0.3" in said, f"{failed}")
            self._require_made(outcome, "hidden", ended)
        with self._nodes(0) as cluster:
            (self.folder / "unseen").mkdir()
            cluster.start(3, hidden=self.folder / "unseen")
            no_outputs = self._end(self._start("unseen", ADDRESS))
            outcome.require(no_outputs.code == 1 and "is not on node 127.0.0.3" in no_outputs.said, no_outputs.said)
        with self._nodes(1):
            again = self._end(self._start("hidden", ADDRESS, pattern="**/*.mp4"))
            outcome.require(again.code == 0 and again.report["made"] == 1, f"again: {again}")
        shutil.rmtree(hidden)
        outcome.seen = f"{ended.report['made']} made; {said}; without the outputs: {last_line(no_outputs.said)}"
        return outcome

    def ended(self) -> Outcome:
        """Ctrl-C and SIGKILL of the command."""
        outcome = Outcome(
            "ctrl-C, and SIGKILL of the command",
            "exit code 130, unfinished outputs dropped, no worker left; the next call runs what is left",
        )
        with self._nodes(1, 1, 1):
            for ending in (signal.SIGINT, signal.SIGKILL):
                name = ending.name.lower()
                with self._long_clip() as long:
                    process = self._start(name, ADDRESS)
                    wait_for_clip(name=long)
                    self._wait_for_made(name)
                    os.killpg(process.pid, ending) if ending == signal.SIGINT else process.kill()
                    code = self._end(process).code
                    wanted = 130 if ending == signal.SIGINT else -9
                    outcome.require(code == wanted, f"{name}: exit code {code}")
                    outcome.require(not self._output(name, long).exists(), f"{name}: a part was left as an output")
                    left = list((self.folder / name / ".stepcell-map").glob(".work*"))
                    outcome.require(bool(left) == (ending == signal.SIGKILL), f"{name}: {left}")
                    outcome.require(self._no_workers(), f"{name}: workers {workers()} are left")
                    before = len(digests(self.folder / name))
                again = self._end(self._start(name, ADDRESS))
                outcome.require(again.report.get("finished_before") == before, f"{name}: {again}")
                self._require_made(outcome, name, again)
                outcome.seen += f"{name}: {before} of {self.count + 1} were finished; "
        outcome.seen += "the next calls made the others, and digests are equal"
        return outcome

    def own_cluster(self) -> Outcome:
        """Without an address: a cluster of this machine, for one command."""
        outcome = Outcome(
            "a cluster that the command starts",
            "listens on this machine only; leaves no token, no worker, after a minute no process; also if it is killed",
        )
        home = self.folder / "home"
        home.mkdir()
        listening = ""
        temporary = self.folder / "t"
        temporary.mkdir()
        for ending in (None, signal.SIGINT, signal.SIGKILL):
            name = f"own{ending.name if ending else ''}"
            process = self._start(name, None, "--engine", "ray", home=home)
            if ending is not None:
                wait_for_clip()
                listening = listening or subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout
                os.killpg(process.pid, ending) if ending == signal.SIGINT else process.kill()
            ended = self._end(process)
            if ending is None:
                self._require_whole(outcome, name, ended)
            outcome.require(self._no_workers(), f"{name}: workers {workers()} are left")
            until = time.monotonic() + 150  # Ray's own agents miss their node after a minute
            while (left := ray_processes()) and time.monotonic() < until:
                time.sleep(0.2)
            outcome.require(not left, f"{name}: {left} are left")
        ports = [line.split()[3] for line in listening.splitlines()]
        open_to_all = [port for port in ports if "127.0.0.1" not in port]
        outcome.require(bool(ports) and not open_to_all, f"listens on {open_to_all}")
        outcome.require(not (home / ".ray").exists(), "a token was written into the home")
        files = list(temporary.glob("ray*"))
        outcome.require(len(files) <= 1, f"left in the folder of temporary files: {files}")  # one by the kill
        outcome.seen = f"{len(ports)} ports, all on 127.0.0.1; no process left; {len(files)} folder left by the kill"
        return outcome

    @contextmanager
    def _nodes(self, *cpus: int) -> Iterator[Nodes]:
        with nodes(self.folder / "r", self.folder / "nodes.log", *cpus) as started:
            yield started
        shutil.rmtree(self.folder / "r", ignore_errors=True)

    def _start(
        self, name: str, address: str | None, *options: str, pattern: str = "*.mp4", home: Path | None = None
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "stepcell", "map", str(self.model), "--input", str(self.clips / pattern)]
        command += ["--output", str(self.folder / name), "--json", *options]
        command += ["--engine", "ray", "--ray-address", address] if address else []
        environment = dict(os.environ)
        if home is not None:
            environment |= {"HOME": str(home), "TMPDIR": str(self.folder / "t")}
            environment = {key: value for key, value in environment.items() if not key.startswith("RAY_")}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )

    def _end(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for its end: stdout has the report only, and nobody but stepcell says anything."""
        out, said = process.communicate(timeout=600)
        report = json.loads(out) if out else {}
        for word in ("Traceback", "(raylet)", "core_worker", "gcs_client"):
            if word in said:
                raise AssertionError(f"{word} in what was said: {said}")
        return Ended(process.returncode, report, said)

    @contextmanager
    def _long_clip(self) -> Iterator[str]:
        """A clip that takes longer than the others together, in the block."""
        path = self.clips / "zz.mp4"
        write_clip(path, 99, LONG)
        yield "zz"
        path.unlink()

    def _output(self, name: str, clip: str) -> Path:
        return self.folder / name / f"{clip}.mp4"

    def _require_whole(self, outcome: Outcome, name: str, ended: Ended) -> None:
        outcome.require(ended.code == 0, f"exit code {ended.code}: {ended.said[-500:]}")
        outcome.require(ended.report.get("made") == self.count, f"{ended.report}")
        self._require_made(outcome, name, ended)

    def _require_made(self, outcome: Outcome, name: str, ended: Ended) -> None:
        found = {key: value for key, value in digests(self.folder / name).items() if key in self.wanted}
        outcome.require(found == self.wanted, f"digests differ: {len(found)} outputs; {ended.said[-500:]}")

    def _require_once_more(self, outcome: Outcome, ended: Ended, times: int) -> None:
        lines = run_again(ended)
        outcome.require(len(lines) == times, f"{len(lines)} clips were run again: {lines}")
        outcome.seen = f"{ended.report.get('made')} made, digests equal; {'; '.join(lines)}"

    def _wait_for_made(self, name: str) -> None:
        until = time.monotonic() + 120
        while not list((self.folder / name).glob("*.mp4")) and time.monotonic() < until:
            time.sleep(0.05)

    def _no_workers(self) -> bool:
        until = time.monotonic() + 20
        while workers() and time.monotonic() < until:
            time.sleep(0.2)
        return not workers()


def run_again(ended: Ended) -> list[str]:
    """What was said of each clip that was run once more, without its folder."""
    return [line.rpartition("/")[2] for line in ended.said.splitlines() if AGAIN in line]


def write_clip(path: Path, seed: int, frames: int) -> None:
    """A moving pattern with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:144, :176]
    sink = VideoSink(path, Fraction(25))
    for number in range(frames):
        pattern = 128 + 80 * np.sin((columns + 3 * number + seed) / 9) * np.cos((rows - 2 * number) / 7)
        picture = pattern[..., None] + rng.normal(0, 12, (144, 176, 3))
        sink.write(np.clip(picture, 0, 255).astype(np.uint8))
    sink.close()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each output."""
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in sorted(folder.glob("*.mp4"))}


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder without what differs between two runs."""
    found = {}
    for path in sorted((folder / ".stepcell-map").rglob("*.json")):
        record = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in record.items() if key not in ("seconds", "checksum")}
    return found


def ray_processes() -> list[str]:
    """Processes of Ray."""
    return [
        words[0].decode()[-40:] for _, words in processes() if b"ray" in words[0].rpartition(b"/")[2].split(b"::")[0]
    ]


def last_line(text: str) -> str:
    """The last line with an error."""
    return next((line for line in reversed(text.splitlines()) if line.startswith("error")), "")
