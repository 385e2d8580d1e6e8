"""Creation of ONNX Runtime sessions, tried in a child process first.

ONNX Runtime's optimisers end the process on some models (a segmentation fault, with no message). A child that makes the
same session first turns that into a warning and a session at a lower level of optimisation, or into an error. The
child is started once, takes one model after another, and ends itself when it has been idle; starting it takes
0.2 to 0.4 s, which is the import of ONNX Runtime.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepcell.errors import StepcellError
from stepcell.limits import FIRST_STEP_SECONDS, within_seconds

__all__ = ["choose_level"]

logger = logging.getLogger(__name__)

# Reads requests from stdin: a line of JSON and the bytes of the model. Answers each with one byte. A session that
# cannot be made is no crash: the parent meets the same exception.
_CHILD = """
import json, os, sys, threading
sys.path[:] = [path for path in sys.path if path]  # not the current folder
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass
import onnxruntime
idle = None
while line := sys.stdin.buffer.readline():
    if idle is not None:
        idle.cancel()
    request = json.loads(line)
    model = request["path"] or sys.stdin.buffer.read(request["size"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(request["level"])
    for name, size in request["sizes"].items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:
        pass
    del model
    os.write(1, b".")
    idle = threading.Timer(10, os._exit, [0])
    idle.daemon = True
    idle.start()
"""
_PATIENCE = 5.0  # seconds for a child whose input has ended
_LEVELS = (2, 1, 0)  # below all optimisations: without the layout optimisers, basic ones, none


def choose_level(model: bytes | str, options: Any, subject: str, sizes: Mapping[str, int] | None = None) -> None:
    """Lower the optimisation level in `options` until a session on the CPU can be made without a crash of the process.

    Args:
        model: the model, or the path of its file.
        options: `onnxruntime.SessionOptions`, which may be changed; a warning says so.
        subject: what messages call the model.
        sizes: sizes that `options` gives symbols.

    Raises:
        StepcellError: the process ends at every level.
        InputError: a session takes longer than the limit.
    """
    asked = options.graph_optimization_level
    ended = _try(model, int(asked), sizes or {}, subject)
    if ended is None:
        return
    import onnxruntime

    for level in (level for level in _LEVELS if level < int(asked)):
        if _try(model, level, sizes or {}, subject) is None:
            options.graph_optimization_level = type(asked)(level)
            logger.warning(
                f"{subject}: ONNX Runtime {onnxruntime.__version__} {ended} while it optimises this model; it is used "
                f"with {'fewer' if level else 'no'} optimisations, which is slower"
            )
            return
    raise StepcellError(
        f"{subject}: ONNX Runtime {onnxruntime.__version__} {ended} while it loads this model",
        hint="a fault of ONNX Runtime: try another version (pip install onnxruntime==...), or another --precision",
    )


def _try(model: bytes | str, level: int, sizes: Mapping[str, int], subject: str) -> str | None:
    """How the child ended; None if it made the session, or refused to with an exception."""
    with _lock:
        for _ in range(2):  # an idle child may end itself just before it is asked
            child = _running()
            if child is None or child.stdin is None or child.stdout is None:
                return None
            data = b"" if isinstance(model, str) else model
            path = str(Path(model).resolve()) if isinstance(model, str) else ""
            request = {"path": path, "size": len(data), "level": level, "sizes": dict(sizes)}
            try:
                child.stdin.write(json.dumps(request).encode() + b"\n" + data)
                child.stdin.flush()
                read = functools.partial(child.stdout.read, 1)
                if within_seconds(FIRST_STEP_SECONDS, read, f"{subject}: loading in ONNX Runtime", stop=child.kill):
                    return None
            except OSError:
                pass
            code = _end()
            if code != 0:
                return _said(code)
        return None


def _running() -> subprocess.Popen[bytes] | None:
    """The child, started if there is none; None where no process can be started."""
    global _child
    if _child is None or _child.poll() is not None:
        _end()
        try:
            _child = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except OSError as error:
            logger.debug(f"sessions are made without a trial in another process: {error}")
            _child = None
    return _child


def _end() -> int:
    """End the child if it still runs; its exit code."""
    global _child
    child, _child = _child, None
    if child is None:
        return 0
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        return child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _said(code: int) -> str:
    if code >= 0:
        return f"ends its process with code {code}"
    try:
        return f"ends its process with {signal.Signals(-code).name}"
    except ValueError:
        return f"ends its process with signal {-code}"


atexit.register(_end)
_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None
