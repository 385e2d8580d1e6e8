"""Runs clips in actors of a Ray cluster, one loop each.

Plain actors and not Ray Data, which cannot keep what `stepcell map` promises (Ray 2.60): it runs a clip that kills its
worker again without end; with a limit, clips that a killed node had not begun count as tried, and are dropped.

This is the only module that imports ray. It is told to send no statistics and to print nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stepcell import __version__
from stepcell.errors import DeviceError, OutputError, StepcellError, UsageError
from stepcell.optional_imports import require
from stepcell.runtime.corpus.clip_runner import ClipResult
from stepcell.runtime.corpus.job import Clip, Job
from stepcell.runtime.corpus.pool import Pool, Worker
from stepcell.runtime.corpus.record import model_sha256
from stepcell.runtime.corpus.worker import ClipControl, ClipWorker

__all__ = ["RayPool", "ray_pool"]

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0  # to wait for an actor that is asked to stop
_WAIT_SECONDS = 30.0  # for the first actor, before it is said that none has started
_ALIVE_SECONDS = 1.0  # between two looks at the node of an actor
_CONNECT_SECONDS = 5.0
_OBJECT_STORE = 80 << 20  # bytes, about the least that Ray takes: only messages pass through it
# Ray reads these when it is imported. Its messages of dead workers would go to stdout; the pool has its own.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


@contextlib.contextmanager
def ray_pool(
    job: Job, clips: Sequence[Clip], work: Path, *, workers: int | None, address: str | None
) -> Iterator[RayPool]:
    """A pool in a cluster, which is left at the end, or ended if it was started here.

    Args:
        clips: that are to be run: no more actors than clips are started.
        work: an empty folder for unfinished outputs, which every node must see, as it must the model and the clips.
        workers: actors; None: one for each CPU of the cluster, or for each GPU if the job runs on one.
        address: of the cluster; None: that of RAY_ADDRESS, otherwise one is started on this machine.

    Raises:
        MissingDependencyError: ray is not installed.
        UsageError: the address of a Ray client, or a GPU with a number.
        DeviceError: the cluster does not answer.
    """
    device = str(job.options.get("device", "cpu"))
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: Ray chooses the GPU of each worker", hint="--device cuda")
    kind = "CPU" if device == "cpu" else "GPU"
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and "://" in address:
        raise UsageError(
            f"--ray-address: expected HOST:PORT or auto, got {address!r}",
            hint="run the command on a machine of the cluster, such as with `ray job submit`",
        )
    absolute = all(path.is_absolute() for path in (job.model, work, *(clip.source for clip in clips)))
    cores = len(os.sched_getaffinity(0))
    with _connected(address, max(1, min(workers or cores, len(clips)))) as ray:
        there = int(ray.cluster_resources().get(kind, 0))
        count = max(1, min(workers or there, len(clips)))
        resources: dict[str, float] = {"num_cpus": 1}
        if kind == "GPU":  # workers may share one
            resources["num_gpus"] = 1 / max(1, -(-count // max(1, there)))
        yield RayPool(job, count, work, ray=ray, resources=resources, folder=None if absolute else Path.cwd())


class _Actor(Worker):
    """One actor, as the command sees it: `_RayWorker` is its other end."""

    def __init__(self, work: Path, ray: ModuleType, handle: Any, opening: Any) -> None:
        super().__init__(work)
        self.messages = opening  # a generator of references to messages; None: there are none to come
        self._ray, self._handle = ray, handle
        self._ending = ""

    @property
    def ending(self) -> str:
        return self._ending

    def leave(self) -> None:
        if self.clip is not None:
            self._handle.stop.remote()

    def _send(self, clip: Clip) -> None:
        self.messages = self._handle.run.options(num_returns="streaming").remote(clip)

    def _take(self) -> tuple[str, Any] | None:
        try:
            message: tuple[str, Any] = self._ray.get(next(self.messages))
        except self._ray.exceptions.RayError as error:
            self._ending = _reason(error)
            return None
        except StopIteration:
            self._ending = "ended without a word"
            return None
        if message[0] in ("ready", "done"):
            self.messages = None
        return message

    def _end(self) -> None:
        until = time.monotonic() + _END_SECONDS
        while self.clip is not None and not self.lost and (left := until - time.monotonic()) > 0:
            if self._ray.wait([self.messages], timeout=left)[0]:
                self.receive()
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._handle)


class RayPool(Pool[_Actor]):
    """A pool of actors that are started as needed, spread over the nodes."""

    max_unopened = 3  # one may be put on a node that has just died

    def __init__(
        self, job: Job, workers: int, work: Path, *, ray: ModuleType, resources: dict[str, float], folder: Path | None
    ) -> None:
        super().__init__(job, workers, work)
        self._ray = ray
        self._folder = folder
        # Not restarted, and no call repeated, by Ray: it would not tell, and a clip could be run without end.
        self._actor = ray.remote(_RayWorker).options(
            max_restarts=0, max_task_retries=0, max_concurrency=2, scheduling_strategy="SPREAD", **resources
        )
        self._say_at: float | None = time.monotonic() + _WAIT_SECONDS

    def _start(self, work: Path) -> _Actor:
        handle = self._actor.remote()
        opening = handle.open.options(num_returns="streaming").remote(self._job, work, self._folder, __version__)
        return _Actor(work, self._ray, handle, opening)

    def _answering(self, workers: Sequence[_Actor], seconds: float) -> list[_Actor]:
        waiting = [each for each in workers if each.messages is not None]
        ready, _ = self._ray.wait([each.messages for each in waiting], timeout=seconds)
        if any(each.ready for each in workers):
            self._say_at = None
        elif self._say_at is not None and time.monotonic() > self._say_at:
            self._say_at = None
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
            shown = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
            logger.warning(f"Ray: no worker has started after {_WAIT_SECONDS:g} s; free are {shown}; waiting on")
        return [each for each in waiting if any(each.messages is messages for messages in ready)]


class _RayWorker:
    """The actor: each call yields the messages of `ClipWorker`."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._control = ClipControl()
        self._worker: ClipWorker | None = None
        self._node = ""

    def open(self, job: Job, work: Path, folder: Path | None, version: str) -> Iterator[tuple[str, Any]]:
        """Check that this node sees what the command sees, and open the model."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self._node = str(require("ray", extra="ray", purpose="--engine ray").util.get_node_ip_address())
        try:
            self._check_node(job, work, folder, version)
        except StepcellError as error:
            yield "unopened", error
            return
        self._worker = ClipWorker(job, work, lambda kind, value: self._messages.put((kind, value)))
        yield from self._said("ready", "unopened")

    def run(self, clip: Clip) -> Iterator[tuple[str, Any]]:
        """Run a clip."""
        if (missing := self._not_here(clip)) is not None:
            yield "done", ClipResult(error=missing, exit_code=1)
            return
        threading.Thread(target=self._run, args=(clip,), daemon=True).start()
        yield from self._said("done")

    def stop(self) -> None:
        """Drop the clip that is being run."""
        self._control.stop()

    def _run(self, clip: Clip) -> None:
        assert self._worker is not None
        try:
            self._worker.run(clip, self._control)
        except BaseException:  # else `run` would wait for ever
            os._exit(1)

    def _said(self, *last: str) -> Iterator[tuple[str, Any]]:
        kind = ""
        while kind not in last:
            kind, value = self._messages.get()
            yield kind, value

    def _check_node(self, job: Job, work: Path, folder: Path | None, version: str) -> None:
        hint = "model, clips and outputs have to be under the same paths on every node: a shared folder"
        if version != __version__:
            raise DeviceError(f"node {self._node}: has stepcell {__version__}, the command is {version}")
        try:
            if folder is not None:
                os.chdir(folder)
        except OSError as error:
            raise DeviceError(
                f"node {self._node}: has no folder {folder}, where the command was called with relative paths",
                hint="name model, clips and outputs from the root, or call the command in a shared folder",
            ) from error
        if not work.is_dir():
            raise OutputError(f"{job.root}: is not on node {self._node}", hint=hint)
        if model_sha256(job.model) != job.made_by[0]:
            raise DeviceError(f"{job.model}: is another file on node {self._node}", hint=hint)

    def _not_here(self, clip: Clip) -> str | None:
        """What is wrong with a clip that is not here as the command saw it; errors of others are of the run."""
        try:
            size = clip.source.stat().st_size
        except OSError as error:
            return f"{clip.source}: cannot be read ({error.strerror}) on node {self._node}" if clip.size else None
        if clip.source.is_dir() or size == clip.size or not clip.size:
            return None
        return f"{clip.source}: has {size} bytes on node {self._node}, and had {clip.size} when the run was planned"


def _end_with_parent() -> None:
    """End this process soon after its node: Ray's own workers go on for up to a minute, on what nobody waits for."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_ALIVE_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def _connected(address: str | None, cpus: int) -> Iterator[ModuleType]:
    """The package ray, connected to a cluster.

    It is the one that the caller is connected to, or that of an address, or a new one that is ended with the block and
    that only this user of this machine reaches.
    """
    os.environ.update(_QUIET)
    if address is None and "ray" not in sys.modules:  # without a mode Ray would write a token into the home
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = require("ray", extra="ray", purpose="--engine ray")
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if address is None:
            folder = tempfile.mkdtemp(prefix="ray-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            # On this address it listens for this machine only.
            quiet |= {"_node_ip_address": "127.0.0.1", "_temp_dir": folder, "include_dashboard": False}
            quiet |= {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE}
        else:
            _check_port(address)
        stack.callback(ray.shutdown)
        try:
            with _kept_handler(signal.SIGTERM), _no_stderr():
                ray.init(address=address or "local", **quiet)
        except Exception as error:  # of many kinds: what matters is that there is no cluster
            where = f"no cluster at {address}" if address else "no cluster can be started on this machine"
            raise _no_cluster(f"{where} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error
        yield ray


def _no_cluster(what: str) -> DeviceError:
    return DeviceError(
        f"Ray: {what}", hint="the command runs on a machine of the cluster; `ray status` shows whether that answers"
    )


def _check_port(address: str) -> None:
    """Raise DeviceError if nothing listens there: Ray itself tries for two minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise UsageError(f"--ray-address: expected HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"no cluster at {address} ({error})") from error


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """What compiled code of this process, and processes that it starts, write to stderr goes nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Ray replaces the handler of a signal when it connects: here the one before is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _reason(error: Exception) -> str:
    """What Ray says of a dead actor, in a line."""
    text = str(error)
    node = next((line.split()[-1] for line in text.splitlines() if line.strip().startswith("ip:")), "")
    where = f" on node {node}" if node else ""
    if "node" in text and ("node died" in text or "node has died" in text or "node failure" in text):
        return f"was lost with its node {node}"
    if "RayTaskError" in type(error).__name__:
        return f"failed{where}: {text.strip().splitlines()[-1]}"
    if "memory" in text and "OutOfMemory" in type(error).__name__:
        return f"was ended by Ray for want of memory{where}"
    if "Unavailable" in type(error).__name__:
        return f"no longer answers{where} (killed, or its node is lost)"
    return f"died{where} ({type(error).__name__}; out of memory?)"
