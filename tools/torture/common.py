"""What the torture scenarios share: their inputs, children with limits, and the row each adds to the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from stepcell import open_source
from stepcell.models.zoo.denoiser import Denoiser

STEPCELL = (sys.executable, "-m", "stepcell")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
ENOUGH = 300.0  # seconds for a child that is not killed
FRAMES = 400


@dataclass
class Outcome:
    """One row of the table.

    Attributes:
        name: the scenario.
        promised: what stepcell's documents say.
        tried: how often it was tried.
        seen: what came out.
        broken: one line for every time the promise did not hold.
    """

    name: str
    promised: str
    tried: int = 0
    seen: str = ""
    broken: list[str] = field(default_factory=list)

    def require(self, holds: bool, otherwise: str) -> None:
        """Note that the promise did not hold."""
        if not holds:
            self.broken.append(otherwise)


@dataclass(frozen=True)
class Inputs:
    """A small denoiser and a clip, made once for all scenarios.

    Attributes:
        checkpoint: .safetensors with the weights.
        model: its float32 export.
        other_model: the export of other weights, as an older file at an output.
        clip: uint8 frames of 32x32.
        whole: the outputs of an uninterrupted run.
    """

    checkpoint: Path
    model: Path
    other_model: Path
    clip: Path
    whole: Path

    @classmethod
    def make(cls, folder: Path) -> Inputs:
        """Write them into a folder."""
        names = ("denoiser.safetensors", "model.onnx", "other.onnx", "clip.npy", "whole.npy")
        inputs = cls(*(folder / name for name in names))
        np.save(inputs.clip, np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), np.uint8))
        for seed, path in ((1, inputs.other_model), (0, inputs.model)):
            torch.manual_seed(seed)
            save_file(Denoiser(hidden=4).state_dict(), inputs.checkpoint)
            require_success(stepcell("export", inputs.checkpoint, "--precision", "float32", "-o", path))
        require_success(stepcell("run", inputs.model, "--threads", 1, "-i", inputs.clip, "-o", inputs.whole))
        return inputs


def command(*arguments: object) -> list[str]:
    """The command line of stepcell with these arguments."""
    return [*STEPCELL, *map(str, arguments)]


def stepcell(*arguments: object, limits: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run stepcell to its end; `limits` is called in the child before it."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=ENOUGH,
        env=ENVIRONMENT,
        preexec_fn=limits,
        check=False,
    )


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    """Raise RuntimeError unless a preparing command succeeded."""
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)} failed with {done.returncode}:\n{done.stderr}")


def is_documented(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a child succeeded, or ended with a documented exit code and an error in words."""
    if "Traceback" in done.stderr or done.returncode not in range(7):
        return False
    return done.returncode == 0 or "error: " in done.stderr


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a child said, for the table."""
    return f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}"


def hidden(folder: Path) -> list[str]:
    """Names of hidden files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def count(path: Path) -> int:
    """Number of frames that can be read from an output; 0: there is none."""
    if not path.exists():
        return 0
    return len(np.load(path)) if path.suffix == ".npy" else sum(1 for _ in open_source(str(path)))
