"""Runs a server, and watches it: `python -m stepcell.runtime.serving.serve OUT/models --model NAME`, as serve.sh does.

A server whose model process was killed answers every frame with an error, and says that it is ready all the same. So a
frame is stepped every few seconds. When that fails, the server is stopped and started again; its streams are continued
from their snapshots, by other servers meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

from stepcell.errors import StepcellError
from stepcell.runtime.serving.protocol import CHECK, FrameRequest, check_values
from stepcell.runtime.serving.server_process import ServerProcess
from stepcell.runtime.serving.triton_transport import TritonTransport

__all__ = ["main"]

logger = logging.getLogger(__name__)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="serve.sh", description=(__doc__ or "").partition("\n")[2], epilog="example: ./serve.sh --http 8000"
    )
    parser.add_argument("models", type=Path, help="folder of models")
    parser.add_argument("--model", required=True, help="name of the model whose frames are stepped")
    parser.add_argument("--address", default="127.0.0.1", help="to listen on (127.0.0.1); without authentication")
    parser.add_argument("--http", type=int, default=8000, help="port (8000)")
    parser.add_argument("--grpc", type=int, default=8001, help="port (8001)")
    parser.add_argument("--metrics", type=int, default=8002, help="port (8002)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds from one check to the next (2)")
    parser.add_argument("--failures", type=int, default=2, help="failed checks after which it is started again (2)")
    parser.add_argument("--start-seconds", type=float, default=300.0, help="until a start counts as failed (300)")
    options = parser.parse_args()
    logging.basicConfig(format="watchdog: %(message)s", level=logging.INFO, stream=sys.stderr)
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: ending.set())
    try:
        started = False
        while not ending.is_set():
            reason, ready = _run(options, ending)
            started = started or ready
            if not (ending.is_set() or started):  # a start that fails later is tried again
                raise StepcellError(f"the server does not start: {reason}", hint="its log is above")
            ending.wait(1)
    except StepcellError as error:
        logger.error(f"error: {error}")
        return error.exit_code
    return 0


def _run(options: argparse.Namespace, ending: threading.Event) -> tuple[str, bool]:
    """A server from its start to its end; returns why it was stopped, and whether it had stepped frames."""
    server = ServerProcess(
        options.models,
        options.model,
        address=options.address,
        http=options.http,
        grpc=options.grpc,
        metrics=options.metrics,
    )
    host = "127.0.0.1" if options.address == "0.0.0.0" else options.address
    transport = TritonTransport(f"http://{host}:{options.http}", options.model, timeout=5.0)
    started, failures, ready = time.monotonic(), 0, False
    try:
        while not ending.wait(options.every if ready else 0.2):
            fault = server.fault()
            if fault is None:
                try:
                    _check(transport)
                    failures = 0
                    if not ready:
                        ready = True
                        server.remember_stubs()
                        logger.info(f"{options.model} steps frames on {host}:{options.http}")
                    continue
                except StepcellError as error:
                    reason = error.message
                failures += ready
                if failures < options.failures and (ready or time.monotonic() - started < options.start_seconds):
                    continue
                fault = f"no frame is stepped: {reason}"
            if ready:
                logger.warning(f"{fault}; the server is started again")
            return fault, ready
        return "", ready
    finally:
        if ending.is_set() and ready:
            try:
                transport.unload(60.0)
            except StepcellError as error:
                logger.warning(f"states since the last snapshots are not written: {error.message}")
        transport.close()
        server.stop(5.0)


def _check(transport: TritonTransport) -> None:
    """Step a frame.

    Raises:
        StepcellError: it is not stepped.
    """
    arrays = {
        name: check_values([1, *(max(1, size) for size in dims)], dtype) for name, dims, dtype in transport.inputs()
    }
    transport.infer(FrameRequest(secrets.randbits(62) + 1, 0, CHECK, arrays, start=True, end=True))


if __name__ == "__main__":
    sys.exit(main())
