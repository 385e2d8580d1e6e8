"""The process in which one input is fuzzed. Nothing of stepcell is imported in it before it is observed."""

from __future__ import annotations

import argparse
import logging
import os
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.harness import Outcome

__all__ = ["fuzz_one"]


def fuzz_one(name: str, options: argparse.Namespace, sender: Connection) -> None:
    """Fuzz one input; options are those of the command, and the outcome goes to `sender` as a dict."""
    os.environ.setdefault("STEPCELL_FIRST_STEP_SECONDS", "10")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.CRITICAL)
    if options.random:
        from tests.fuzz.harness import fuzz
        from tests.fuzz.inputs import INPUTS
    else:
        import atheris

        with atheris.instrument_imports(include=["stepcell"]):
            from tests.fuzz.harness import fuzz, fuzz_guided
            from tests.fuzz.inputs import INPUTS

    def send(outcome: Outcome) -> None:
        sender.send({**vars(outcome), "ends": dict(outcome.ends)})

    what = next(each for each in INPUTS if each.name == name)
    limits: dict[str, Any] = {key: getattr(options, key) for key in ("seed", "cases", "seconds", "keep")}
    if options.random:
        send(fuzz(what, **limits))
    else:
        fuzz_guided(what, send, **limits)
