"""A process of Triton Inference Server: the one of the wheel nvidia-pytriton, or the one of the system or container."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from stepcell.errors import MissingDependencyError

__all__ = ["ServerProcess"]

logger = logging.getLogger(__name__)
_STUB = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")


class ServerProcess:
    """A server, with its stubs: a process for each instance of a model, in which Python runs.

    Args:
        repository: folder of models.
        address: to listen on.
        http, grpc, metrics: its ports.

    Raises:
        MissingDependencyError: there is no server.
    """

    def __init__(self, repository: Path, *, address: str, http: int, grpc: int, metrics: int) -> None:
        self._prefix = f"stepcell-{http}-"  # of its regions of shared memory
        self._remove_leftovers()
        program, environment, options = _installed()
        command = [
            program,
            f"--model-repository={repository}",
            *options,
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            *(f"--{kind}-address={address}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={http}",
            f"--grpc-port={grpc}",
            f"--metrics-port={metrics}",
            "--exit-timeout-secs=30",
            "--disable-auto-complete-config",
        ]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self.stubs: set[int] = set()

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    def remember_stubs(self) -> None:
        """Take the stubs that run now as those that have to."""
        self.stubs = set(_stubs(self._prefix))

    def fault(self) -> str | None:
        """What has ended: the server, or a stub, which the server neither tells nor starts again; None: nothing."""
        if self._process.poll() is not None:
            return f"the server ended with {self._process.returncode}"
        gone = self.stubs - set(_stubs(self._prefix))
        return f"the process {min(gone)} of an instance has ended" if gone else None

    def stop(self, seconds: float) -> None:
        """End it: by SIGTERM, after which instances write their snapshots, and by SIGKILL after so many seconds."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # of the session: stubs whose server is gone too
        self._process.wait()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """End stubs and remove shared memory that a killed server of the same port left behind."""
        for pid in _stubs(self._prefix):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for _ in range(50):
            if not list(_stubs(self._prefix)):
                break
            time.sleep(0.1)
        for path in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _stubs(prefix: str) -> Iterator[int]:
    """Stubs of servers with this prefix."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(_STUB.encode()) and any(word.startswith(prefix.encode()) for word in words):
                yield int(path.parent.name)


def _installed() -> tuple[str, dict[str, str], list[str]]:
    """The program, its environment and its options."""
    environment = dict(os.environ)
    # The stub looks for `python3` and its packages in the path; this is the environment that has stepcell.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        program = shutil.which("tritonserver")
        if program is None:
            raise MissingDependencyError(
                "there is no Triton Inference Server here",
                hint="pip install 'nvidia-pytriton==0.7.0' 'numpy<2', or run this in NVIDIA's container",
            )
        return program, environment, []
    wheel = Path(found.origin).parent
    server = wheel / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub, link = server / "python_backend_stubs" / version / _STUB, server / "backends" / "python" / _STUB
    if not link.exists():
        link.symlink_to(stub)
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(wheel.parent / "nvidia_pytriton.libs")]
    earlier = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries + ([earlier] if earlier else []))
    return str(server / "bin" / "tritonserver"), environment, [f"--backend-directory={server / 'backends'}"]
