"""A process of Triton Inference Server: the one of the wheel nvidia-pytriton, or the one of the system or container."""

from __future__ import annotations

import contextlib
import importlib.metadata
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

from stepcell.errors import MissingDependencyError, UsageError

__all__ = ["ServerProcess"]

logger = logging.getLogger(__name__)
_SERVER, _STUB = "tritonserver", "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")


class ServerProcess:
    """A server, with its stubs: a process for each instance of a model, in which Python runs.

    Args:
        repository: folder of models.
        model: the one to load.
        address: to listen on.
        http, grpc, metrics: its ports.

    Raises:
        MissingDependencyError: there is no server, or its Python has a numpy that it was not built for.
        UsageError: one with this port runs already.
    """

    def __init__(self, repository: Path, model: str, *, address: str, http: int, grpc: int, metrics: int) -> None:
        self._prefix = f"stepcell-{http}-"  # of its regions of shared memory
        running = next(_processes(_SERVER, self._prefix), None)
        if running is not None:  # its stubs and shared memory are in use
            raise UsageError(f"a server of port {http} runs already, as process {running}", hint="choose other ports")
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
            # A server that gets SIGTERM waits for its clients to leave, and then ends without a word to its models: so
            # the model is unloaded before.
            "--model-control-mode=explicit",
            f"--load-model={model}",
            "--exit-timeout-secs=1",
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
        self.stubs = set(_processes(_STUB, self._prefix))

    def fault(self) -> str | None:
        """What has ended: the server, or a stub, which the server neither tells nor starts again; None: nothing."""
        if self._process.poll() is not None:
            return f"the server ended with {self._process.returncode}"
        gone = self.stubs - set(_processes(_STUB, self._prefix))
        return f"the process {min(gone)} of an instance has ended" if gone else None

    def stop(self, seconds: float) -> None:
        """End it: by SIGTERM, and by SIGKILL after so many seconds."""
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
        for pid in _processes(_STUB, self._prefix):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for _ in range(50):
            if not list(_processes(_STUB, self._prefix)):
                break
            time.sleep(0.1)
        for path in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _processes(program: str, prefix: str) -> Iterator[int]:
    """Running servers, or their stubs, whose shared memory has this prefix."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(program.encode()) and any(prefix.encode() in word for word in words):
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
    numpy, built = (importlib.metadata.version(name) for name in ("numpy", "nvidia-pytriton"))
    if built == "0.7.0" and int(numpy.split(".")[0]) > 1:
        raise MissingDependencyError(
            f"the Python back end of nvidia-pytriton {built} damages arrays of numpy {numpy}",
            hint="pip install 'numpy<2'",
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub, link = server / "python_backend_stubs" / version / _STUB, server / "backends" / "python" / _STUB
    if not link.exists():
        link.symlink_to(stub)
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(wheel.parent / "nvidia_pytriton.libs")]
    earlier = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries + ([earlier] if earlier else []))
    return str(server / "bin" / "tritonserver"), environment, [f"--backend-directory={server / 'backends'}"]
