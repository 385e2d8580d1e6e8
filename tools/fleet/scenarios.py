"""What is done to the servers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

from stepcell.client import RefusedFrame, StreamClient
from stepcell.errors import StepcellError
from stepcell.runtime.serving.protocol import FrameRequest
from stepcell.runtime.serving.triton_transport import TritonTransport
from tools.fleet.clients import Clients, Stream, digest, expected, frame
from tools.fleet.outcome import Outcome
from tools.fleet.servers import MODEL, SERVER, STUB, Server, balancer, serving, write_repository

NAMED = {"OUT_OF_STEP", "RESUMED_AT", "NO_SNAPSHOT", "STATE_LOST", "FULL", "FAILED"}


class Scenarios:
    """Each method is one scenario.

    Args:
        model: the denoiser, float32, for any size.
        folder: for repositories, logs and snapshots.
        rng: moments of kills.
        port: the first of a dozen that are free.
        kills, starts: how often.
    """

    def __init__(self, model: Path, folder: Path, rng: random.Random, *, port: int, kills: int, starts: int) -> None:
        self.model, self.folder, self.rng, self.kills, self.starts = model, folder, rng, kills, starts
        self.port = port
        self.log = folder / "server.log"

    def equal(self, instances: int) -> Outcome:
        """8 client processes, 200 frames each, half of them by gRPC."""
        slots = 8 // instances
        outcome = Outcome(f"8 clients, {instances} x {slots} slots", "every answer is that of a loop of its own")
        repository = self._repository("equal", "--slots", slots, "--instances", instances)
        with serving(repository, self.port, self.log) as server:
            clients = Clients([server.url, f"grpc://127.0.0.1:{server.grpc}"], MODEL, 8, 200)
            streams = clients.results()
        wrong = self._judge(outcome, streams, complete=200)
        seconds = max(stream.seconds for stream in streams)
        outcome.seen = f"1600 answers, {wrong} wrong, {1600 / seconds:.0f} frames/s with all clients on the same cores"
        return outcome

    def numpy_2(self) -> Outcome:
        """A Python whose numpy the back end was not built for."""
        outcome = Outcome("numpy 2 in the server's Python", "the server does not start, and says why")
        packages = self.folder / "numpy2"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), "numpy==2.2.6"]
        subprocess.run(command, check=True, capture_output=True)
        log = self.folder / "numpy2.log"
        path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        server = Server(self._repository("numpy2"), self.port, log, {"PYTHONPATH": path})
        try:
            code = server.process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        server.stop()
        text = log.read_text()
        outcome.require(code == 5, f"exit code {code}")
        outcome.require("arrays of numpy 2" in text, "the log does not say so")
        outcome.seen = (
            f"exit code {code}: " + next((line for line in text.splitlines() if "arrays of numpy" in line), "")[:160]
        )
        return outcome

    def idle(self) -> Outcome:
        """The server's own memory of a sequence ends; streams that are started without end."""
        outcome = Outcome(
            f"idle streams, and {self.starts} STARTs without END",
            "a stream outlives the server's time-out; a slot is never lost; what has no slot is told FULL at once",
        )
        repository = self._repository("idle", "--slots", 4, "--idle", "1s")
        with serving(repository, self.port, self.log) as server:
            wanted, seen, slowest = expected(self.model, 0, 12), Counter[str](), 0.0
            with StreamClient(server.url, MODEL) as stream:
                for number in range(12):
                    outcome.require(digest(stream.step(x=frame(0, number))["y"]) == wanted[number], f"frame {number}")
                    time.sleep(2.5 if number in (3, 7) else 0)
            transport = TritonTransport(server.url, MODEL)
            first = wanted[0]
            for stream_id in range(1, self.starts + 1):
                before = time.monotonic()
                name = self._send(transport, FrameRequest(stream_id, 1, 0, {"x": frame(0, 0)[None]}, start=True), first)
                seen[name] += 1
                slowest = max(slowest, time.monotonic() - before)
            outcome.require(set(seen) <= {"right", "FULL"}, f"{dict(seen)}")
            outcome.require(slowest < 5, f"{slowest:.1f} s for one of them")
            time.sleep(1.5)
            after = [
                self._send(transport, FrameRequest(10**9 + each, 1, 0, {"x": frame(0, 0)[None]}, start=True), first)
                for each in range(4)
            ]
            outcome.require(after == ["right"] * 4, f"afterwards: {after}")
            transport.close()
        outcome.seen = f"{dict(seen)}, the slowest took {slowest * 1e3:.0f} ms; afterwards four new streams: {after}"
        return outcome

    def shared_id(self) -> Outcome:
        """Two clients with one id, reordered and repeated frames."""
        outcome = Outcome(
            "one id, two clients; frames reordered and repeated",
            "OUT_OF_STEP for what does not follow; no other effect",
        )
        with serving(self._repository("shared"), self.port, self.log) as server:
            transport, wanted = TritonTransport(server.url, MODEL), expected(self.model, 0, 6)

            def send(number: int, client: int = 1, *, start: bool = False, seed: int = 0) -> str:
                arrays = {"x": frame(seed, number)[None]}
                return self._send(transport, FrameRequest(77, client, number, arrays, start=start), wanted[number])

            steps: list[tuple[str, str]] = [
                (send(0, start=True), "right"),
                (send(1), "right"),
                (send(0, client=2, start=True, seed=1), "OUT_OF_STEP"),
                (send(2, client=2, seed=1), "OUT_OF_STEP"),
                (send(2), "right"),
                (send(4), "OUT_OF_STEP"),
                (send(3), "right"),
                (send(3), "right"),
                (send(0, start=True), "OUT_OF_STEP"),
                (send(4), "right"),
            ]
            transport.close()
        for place, (found, meant) in enumerate(steps):
            outcome.require(found == meant, f"request {place}: {found} instead of {meant}")
        outcome.seen = ", ".join(found for found, _ in steps)
        return outcome

    def in_flight(self) -> Outcome:
        """16 requests of one stream at once, by gRPC: the server exchanges them."""
        outcome = Outcome("16 requests of one stream in flight", "each answer is right, or an error")
        seen: Counter[str] = Counter()
        with serving(self._repository("flight"), self.port, self.log) as server:
            wanted = expected(self.model, 0, 200)
            client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
            reached = 0
            done = threading.Semaphore(0)
            found: list[tuple[int, Any, Any]] = []

            def answered(number: int, result: Any, error: Any) -> None:
                found.append((number, result, error))
                done.release()

            for _ in range(40):
                numbers = range(reached, min(reached + 16, 200))
                for number in numbers:
                    inputs = []
                    for name, array in (
                        ("x", frame(0, number)[None]),
                        ("FRAME", np.array([[number]])),
                        ("CLIENT", np.array([[1]])),
                    ):
                        inputs.append(grpc.InferInput(name, array.shape, "UINT8" if name == "x" else "INT64"))
                        inputs[-1].set_data_from_numpy(array)
                    client.async_infer(
                        MODEL, inputs, lambda result, error, number=number: answered(number, result, error),
                        sequence_id=5, sequence_start=number == 0,
                    )  # fmt: skip
                complete = all(done.acquire(timeout=5) for _ in numbers)
                for number, result, error in found:
                    if error is None:
                        right = digest(np.array(result.as_numpy("y"))[0]) == wanted[number]
                        seen["right" if right else "WRONG"] += 1
                        reached = max(reached, number + 1)
                    else:
                        refusal = RefusedFrame.parse(str(error))
                        name = "the server's own" if "must specify the START flag" in str(error) else str(error)
                        seen[name if refusal is None else refusal.name] += 1
                found.clear()
                if not complete:
                    seen["no answer"] += 1
                if not complete or reached >= 200:
                    break
            client.close()
        outcome.require(set(seen) <= {"right", "OUT_OF_STEP", "the server's own", "no answer"}, f"{dict(seen)}")
        outcome.require(reached >= 10, f"frame {reached} was reached")
        outcome.seen = f"{dict(seen)}; frame {reached} was reached"
        return outcome

    def deadlines(self) -> Outcome:
        """Clients that give up waiting, and send the frame again."""
        outcome = Outcome("deadlines shorter than a step, and retries", "no frame is stepped twice")
        with serving(self._repository("deadlines"), self.port, self.log) as server:
            urls = [server.url, f"grpc://127.0.0.1:{server.grpc}"]
            streams = Clients(urls, MODEL, 4, 60, timeout=0.03, deadline=60.0).results()
        wrong = self._judge(outcome, streams, complete=60)
        retries = sum(stream.events.get("unreachable", 0) for stream in streams)
        outcome.require(retries > 0, "no deadline passed")
        outcome.seen = f"240 answers, {wrong} wrong; {retries} retries"
        return outcome

    def dead_processes(self) -> Outcome:
        """SIGKILL of stub and server at random moments, with four clients."""
        outcome = Outcome(
            f"{self.kills} kills of stub or server",
            "every answer is right, or the error is named; nothing is left behind",
        )
        repository = self._repository("kills", "--slots", 4, *self._snapshots("kills"))
        killed: Counter[str] = Counter()
        with serving(repository, self.port, self.log) as server:
            clients = Clients([server.url], MODEL, 4, 100_000, timeout=2.0, deadline=120.0)
            clients.wait()
            time.sleep(3)
            for _ in range(self.kills):
                kind = self.rng.choice((STUB, SERVER))
                killed[kind.decode()] += server.kill(kind)
                time.sleep(2)
                server.wait()
                time.sleep(self.rng.uniform(1, 4))
            clients.stop()
            streams = clients.results()
        wrong = self._judge(outcome, streams)
        for stream in streams:
            names = set(stream.errors)
            outcome.require(names <= NAMED, f"stream {stream.seed} ended with {names}")
        left = [path.name for path in Path("/dev/shm").glob(f"stepcell-{self.port}-*")]
        outcome.require(not left, f"left in /dev/shm: {left}")
        answers, events = (
            sum(len(stream.answers) for stream in streams),
            sum((Counter(each.events) for each in streams), Counter()),
        )
        ends = [stream.errors for stream in streams if stream.errors]
        longest = max(stream.longest for stream in streams)
        outcome.seen = (
            f"killed {dict(killed)}; {answers} answers, {wrong} wrong; events {dict(events)}; errors {ends}; "
            f"longest time without an answer {longest:.1f} s"
        )
        return outcome

    def balanced(self) -> Outcome:
        """Two servers behind HAProxy, one of which is killed with its watchdog."""
        outcome = Outcome("two servers behind HAProxy, one killed", "all streams go on, bit-equal, and the gap is told")
        if shutil.which("haproxy") is None:
            outcome.seen = "not run: haproxy is not installed"
            return outcome
        servers = [f"127.0.0.1:{port}:{port + 1}" for port in (self.port, self.port + 10)]
        options = [word for each in servers for word in ("--server", each)]
        repository = self._repository("balanced", "--slots", 8, *self._snapshots("balanced"), *options)
        with (
            serving(repository, self.port, self.log) as first,
            serving(repository, self.port + 10, self.log),
            balancer(repository, self.log) as url,
        ):
            clients = Clients([url, "grpc://127.0.0.1:8081"], MODEL, 8, 100_000, timeout=5.0, deadline=60.0)
            clients.wait()
            time.sleep(5)
            first.process.kill()
            killed = [first.kill(SERVER), first.kill(STUB)]
            time.sleep(12)
            clients.stop()
            streams = clients.results()
        wrong = self._judge(outcome, streams)
        outcome.require(all(killed), f"killed {killed}")
        outcome.require(not any(stream.errors for stream in streams), f"{[stream.errors for stream in streams]}")
        moved = [stream for stream in streams if stream.events]
        outcome.require(0 < len(moved) < 8, f"{len(moved)} of 8 streams were on the killed server")
        answers, longest = sum(len(stream.answers) for stream in streams), max(stream.longest for stream in streams)
        outcome.seen = (
            f"{len(moved)} of 8 streams moved: {[each.events for each in moved]}; {answers} answers, {wrong} wrong; "
            f"longest time without an answer {longest:.2f} s"
        )
        return outcome

    def stopped(self) -> Outcome:
        """SIGTERM to a watchdog, and a new one: a rolling update."""
        outcome = Outcome("a server that is stopped and replaced", "no stream loses its state, or sends a frame again")
        repository = self._repository("stopped", *self._snapshots("stopped"), "--snapshot-every", 1000)
        wanted = expected(self.model, 0, 20)
        server = Server(repository, self.port, self.log)
        events: list[str] = []
        server.wait()
        stream = StreamClient(server.url, MODEL, on_event=lambda event: events.append(event.kind))
        for number in range(10):
            outcome.require(digest(stream.step(x=frame(0, number))["y"]) == wanted[number], f"frame {number}")
        server.stop()
        with serving(repository, self.port, self.log):
            for number in range(10, 20):
                outcome.require(digest(stream.step(x=frame(0, number))["y"]) == wanted[number], f"frame {number}")
            stream.close()
        outcome.require(set(events) <= {"unreachable"}, f"{events}")
        outcome.seen = f"20 frames; events {events}"
        return outcome

    def _repository(self, name: str, *options: object) -> Path:
        return write_repository(self.model, self.folder / name, *options)

    def _snapshots(self, name: str) -> tuple[object, ...]:
        return ("--snapshots", self.folder / f"{name}-snapshots", "--snapshot-every", 10)

    def _send(self, transport: TritonTransport, request: FrameRequest, wanted: str) -> str:
        """Send it: right, WRONG or the name of the error."""
        try:
            return "right" if digest(transport.infer(request)["y"][0]) == wanted else "WRONG"
        except RefusedFrame as refusal:
            return refusal.name
        except StepcellError as error:
            return error.message

    def _judge(self, outcome: Outcome, streams: list[Stream], complete: int | None = None) -> int:
        """Compare all answers; the number of wrong ones."""
        total = 0
        for stream in streams:
            wrong = stream.wrong(expected(self.model, stream.seed, len(stream.answers)))
            outcome.require(wrong == 0, f"stream {stream.seed}: {wrong} of {len(stream.answers)} answers are wrong")
            if complete is not None:
                outcome.require(
                    len(stream.answers) == complete,
                    f"stream {stream.seed}: {len(stream.answers)} answers, {stream.errors}",
                )
            total += wrong
        return total
