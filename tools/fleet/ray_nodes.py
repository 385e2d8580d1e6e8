"""A Ray cluster of several nodes on this machine, each with an address of its own, and what its processes are."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HEAD = "127.0.0.2"
PORT = 6399
ADDRESS = f"{HEAD}:{PORT}"
RAY = Path(sys.executable).parent / "ray"
WORKER = b"ray::_RayWorker"


class Nodes:
    """Nodes 127.0.0.2 (the head), 127.0.0.3 and so on; none is started yet.

    Args:
        folder: for Ray's files; a short path, for its sockets.
        log: what `ray start` says.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log

    def start(self, last: int, *, cpus: int = 1, hidden: Path | None = None) -> None:
        """Start the node 127.0.0.LAST.

        Args:
            last: 2 is the head.
            cpus: workers that it can hold.
            hidden: a folder that is empty for this node, as if it were not shared.
        """
        command = [str(RAY), "start", f"--node-ip-address=127.0.0.{last}", f"--num-cpus={cpus}"]
        command += ["--object-store-memory=80000000"]
        if last == 2:
            command += ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        else:
            command += [f"--address={ADDRESS}"]
        if hidden is not None:
            mounted = f'mount -t tmpfs none "{hidden}" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mounted, "sh", *command]
        for _ in range(3):  # on a busy machine Ray gives up waiting for its own processes
            with self._log.open("ab") as log:
                if not subprocess.run(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False
                ).returncode:
                    return
            if last == 2:
                self.stop()
        raise RuntimeError(f"127.0.0.{last} does not start: {self._log.read_text()[-2000:]}")

    def raylet(self, last: int) -> int:
        """Process of a node; its workers are children of it."""
        own = f"--node_ip_address=127.0.0.{last}".encode()
        return next(pid for pid, words in processes() if words[0].endswith(b"/raylet") and own in words)

    @staticmethod
    def stop() -> None:
        """End all nodes."""
        subprocess.run([str(RAY), "stop", "--force"], check=False, capture_output=True)


@contextlib.contextmanager
def nodes(folder: Path, log: Path, *cpus: int) -> Iterator[Nodes]:
    """Nodes with so many CPUs, the head first."""
    started = Nodes(folder, log)
    try:
        for last, count in enumerate(cpus, 2):
            started.start(last, cpus=count)
        yield started
    finally:
        started.stop()


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """All processes with their command lines."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words := (path / "cmdline").read_bytes().split(b"\0"):
                yield int(path.name), words


def workers(raylet: int | None = None) -> list[int]:
    """The processes of stepcell's actors, of one node or of all."""
    found = [pid for pid, words in processes() if words[0].startswith(WORKER)]
    return found if raylet is None else [pid for pid in found if _parent(pid) == raylet]


def kill_node_of(worker: int) -> None:
    """SIGKILL the raylet of a worker; the worker ends when it sees that."""
    os.kill(_parent(worker), signal.SIGKILL)


def clip_of(pid: int) -> str:
    """The name of the clip that a worker writes, as far as it has opened its output: "" if it has not."""
    with contextlib.suppress(OSError):
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = each.readlink()
                if "/.stepcell-map/.work." in str(target) and target.name.startswith("."):
                    return target.name.split(".")[1]
    return ""


def wait_for_clip(*, name: str = "", other_than: int = 0, timeout: float = 120.0) -> int:
    """Wait until a worker, other than one that was just killed, writes a clip (of a name); its process."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for pid in workers():
            if pid != other_than and (clip := clip_of(pid)) and (not name or clip == name):
                return pid
        time.sleep(0.02)
    raise TimeoutError(f"no worker writes a clip {name} within {timeout:g} s")


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
