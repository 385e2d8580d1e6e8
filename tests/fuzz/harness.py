"""The rule of fuzzing: a documented error with its exit code, or a result; never another exception."""

from __future__ import annotations

import os
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepcell.errors import StepcellError
from tests.fuzz.inputs import Input

__all__ = ["Outcome", "fuzz", "fuzz_guided"]

SLOW_SECONDS = 60.0  # also on a busy machine, and with the imports of the first case
MAX_BYTES = 1 << 20  # of a file that coverage guides
OBSERVED = {"include": ["stepcell"], "exclude": ["stepcell.runtime.media.events.loops"]}  # which numba compiles
MEMORY = Path("/dev/shm")  # for the files of the cases; on a disk, half of the time is theirs


@dataclass
class Outcome:
    """Cases of one input: how many ended in each class of error or were accepted, and the faults by their place."""

    cases: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)


class Cases:
    """Runs cases of one input and counts how they end.

    Args:
        folder: for the file that `use` gets.
        keep: see `fuzz`.
    """

    def __init__(self, what: Input, folder: Path, seed: int, keep: Path | None) -> None:
        self.outcome = Outcome()
        self._what, self._path, self._seed, self._keep = what, folder / f"case{what.suffix}", seed, keep
        warnings.simplefilter("ignore")  # numpy's, about numbers that a file has

    def run(self, data: bytes) -> None:
        """One case."""
        outcome, started = self.outcome, time.monotonic()
        self._path.write_bytes(data)
        try:
            self._what.use(self._path)
            outcome.ends["accepted"] += 1
        except StepcellError as error:
            outcome.ends[type(error).__name__] += 1
        except Exception as error:
            outcome.ends["fault"] += 1
            place = f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}"
            if place not in outcome.faults:
                outcome.faults[place] = traceback.format_exc()
                if self._keep is not None:
                    name = f"{self._what.name}-{self._seed}-{outcome.cases}{self._what.suffix}"
                    (self._keep / name).write_bytes(data)
        if time.monotonic() - started > SLOW_SECONDS:
            outcome.faults.setdefault("slow", f"case {outcome.cases} took {time.monotonic() - started:.0f} s")
        outcome.cases += 1


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)


def fuzz(
    what: Input, *, seed: int, cases: int | None = None, seconds: float = 1e9, keep: Path | None = None
) -> Outcome:
    """Run changed seeds until one of the limits.

    Args:
        seed: of the generator; a fault is repeated by the same seed.
        keep: folder for the files that ended in a fault.
    """
    rng = random.Random(f"{what.name} {seed}")
    seeds = what.seeds()
    end = time.monotonic() + seconds
    with _folder() as folder, warnings.catch_warnings():
        runner = Cases(what, Path(folder), seed, keep)
        while runner.outcome.cases != cases and time.monotonic() < end:
            runner.run(what.mutate(rng.choice(seeds), rng))
    return runner.outcome


def fuzz_guided(
    what: Input,
    done: Callable[[Outcome], None],
    *,
    seed: int,
    cases: int | None = None,
    seconds: float = 1e9,
    keep: Path | None = None,
) -> None:
    """Run cases that Atheris chooses: files that reached new code of stepcell are changed further.

    It ends the process, once `done` has got the outcome, and has to come before any import of what is to be observed.
    Arguments are those of `fuzz`.
    """
    import atheris

    end = time.monotonic() + seconds
    with _folder() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        with atheris.instrument_imports(**OBSERVED):
            runner, seeds = Cases(what, folder, seed, keep), what.seeds()
            for number, data in enumerate(seeds):
                runner.run(data)  # imports what it needs
                (corpus / str(number)).write_bytes(data)

        def run(data: bytes) -> None:
            runner.run(data)
            if runner.outcome.cases == cases or time.monotonic() > end:
                done(runner.outcome)
                os._exit(0)

        def change(data: bytes, size: int, number: int) -> bytes:
            rng = random.Random(number)  # many files of the corpus are refused early, so that half start from a seed
            return what.mutate(rng.choice(seeds) if rng.random() < 0.5 else data, rng)[:size]

        options: list[Any] = [f"-seed={seed % (1 << 31) + 1}", f"-max_len={MAX_BYTES}", "-len_control=0"]
        options += ["-rss_limit_mb=0", "-timeout=600", "-verbosity=0", f"-artifact_prefix={keep or folder}/"]
        atheris.Setup(["fuzz", str(corpus), *options], run, custom_mutator=change)
        atheris.Fuzz()
