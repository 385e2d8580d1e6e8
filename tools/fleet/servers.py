"""Real servers on this machine, on 127.0.0.1 only: a repository of the denoiser, its watchdog, the load balancer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import StepcellError
from stepcell.runtime.serving.triton_transport import TritonTransport

__all__ = ["MODEL", "Server", "balancer", "serving", "write_repository"]

MODEL = "denoiser"
STUB, SERVER = b"triton_python_backend_stub", b"tritonserver"


class Server:
    """A watchdog with its server."""

    def __init__(self, repository: Path, port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.http, self.grpc, self.metrics = port, port + 1, port + 2
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [
                repository / "serve.sh",
                *("--http", str(port), "--grpc", str(port + 1), "--metrics", str(port + 2), "--every", "1"),
            ],
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """Of its HTTP port."""
        return f"http://127.0.0.1:{self.http}"

    def wait(self, seconds: float = 90) -> None:
        """Until frames are stepped."""
        transport, ends = TritonTransport(self.url, MODEL, timeout=2), time.monotonic() + seconds
        while True:
            try:
                transport.snapshot_every()
                break
            except StepcellError:
                if time.monotonic() > ends or self.process.poll() is not None:
                    raise
                time.sleep(0.1)
        transport.close()

    def children(self, name: bytes) -> list[int]:
        """Processes of this server whose program ends with a name."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                mine = any(f"stepcell-{self.http}-".encode() in word for word in words)
                if words[0].endswith(name) and mine:
                    found.append(int(path.parent.name))
        return found

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by kind of process."""
        kinds = {"server": SERVER, "model": STUB}
        return {name: sum(map(_cpu_seconds, self.children(kind))) for name, kind in kinds.items()}

    def kill(self, name: bytes) -> int:
        """SIGKILL to one of them; the number of processes that got it."""
        found = self.children(name)[:1]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def stop(self) -> None:
        """SIGTERM to the watchdog."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for name in (STUB, SERVER):
                for pid in self.children(name):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self._log.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(repository: Path, port: int, log: Path) -> Iterator[Server]:
    """A server that steps frames."""
    server = Server(repository, port, log)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def write_repository(model: Path, folder: Path, *options: object) -> Path:
    """Call `stepcell triton-repo`."""
    command = [sys.executable, "-m", "stepcell", "triton-repo", model, "-o", folder, "--name", MODEL, *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder


@contextlib.contextmanager
def balancer(repository: Path, log: Path) -> Iterator[str]:
    """HAProxy with the written file; its URL."""
    with log.open("ab") as file:
        process = subprocess.Popen(["haproxy", "-db", "-f", repository / "haproxy.cfg"], stdout=file, stderr=file)
    try:
        time.sleep(3)  # for its first health checks
        assert process.poll() is None, log.read_text()
        yield "http://127.0.0.1:8080"
    finally:
        process.terminate()
        process.wait()
