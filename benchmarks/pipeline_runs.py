"""The runs of benchmarks/pipeline.py, in a process of the version that is measured: one line of JSON in, one out.

It calls the command line, whose arguments are the same in all versions.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from stepcell.cli import main as stepcell


def main() -> None:
    """Answer until stdin ends: frames per second, and milliseconds of CPU time per frame."""
    for line in sys.stdin:
        folder, model, source, sink, threads, frames = json.loads(line)
        arguments = ["run", f"{folder}/{model}", "-i", f"{folder}/{source}", "--threads", str(threads)]
        if sink:
            Path(folder, sink).unlink(missing_ok=True)
            arguments += ["-o", f"{folder}/{sink}"]
        started, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            stepcell.main(arguments, standalone_mode=False)
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
        sys.stdout.write(json.dumps({"fps": frames / seconds, "cpu_ms": spent / frames * 1e3}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
