"""Training script of the denoiser of the zoo; it does not read the held-out clip.

    python -m stepcell.models.zoo.train_denoiser -o denoiser.safetensors

Takes about an hour on 2 CPU cores. The PSNR that it prints is that of training crops.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from stepcell.models.checkpoint_writer import save_checkpoint
from stepcell.models.step import run_sequence
from stepcell.models.zoo.clips import TRAINING, read_clip
from stepcell.models.zoo.denoiser import Denoiser

# Scales of each clip: shrinking by area averaging removes the codec's blur and blocks and gives the
# network fine detail to preserve.
SCALES = (1, 2, 3)
LEARNING_RATE = 2e-3
NOISE = (10.0, 40.0)  # standard deviations seen in training, in 0 to 255


def sample(
    clips: list[NDArray[np.uint8]], rng: np.random.Generator, batch: int, steps: int, crop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random clean and noisy crops (T, B, 3, crop, crop) in [0, 1], flipped, transposed and time-reversed at random."""
    pixels = np.array([clip.size for clip in clips], dtype=np.float64)
    clean = np.empty((steps, batch, 3, crop, crop), np.float32)
    for b, index in enumerate(rng.choice(len(clips), batch, p=pixels**0.5 / (pixels**0.5).sum())):
        clip = clips[index]
        t, y, x = (
            rng.integers(0, size - window + 1) for size, window in zip(clip.shape[:3], (steps, crop, crop), strict=True)
        )
        piece = clip[t : t + steps, y : y + crop, x : x + crop].transpose(0, 3, 1, 2)
        flips = tuple(slice(None, None, int(sign)) for sign in rng.choice([1, -1], 3))
        piece = piece[flips[0], :, flips[1], flips[2]]
        clean[:, b] = piece.swapaxes(2, 3) if rng.random() < 0.5 else piece
    reference = torch.from_numpy(clean) / 255
    sigma = torch.from_numpy(rng.uniform(*NOISE, (1, batch, 1, 1, 1)).astype(np.float32)) / 255
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    return reference, (reference + sigma * noise).clamp(0, 1)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the checkpoint goes.")
@click.option("--iterations", default=10000, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", default=10, show_default=True, help="Frames per sequence.")
@click.option("--crop", default=64, show_default=True)
@click.option("--hidden", default=32, show_default=True)
@click.option("--seed", default=7, show_default=True)
def main(output: Path, iterations: int, batch: int, steps: int, crop: int, hidden: int, seed: int) -> None:
    """Train and write the checkpoint."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    clips = [read_clip(name, shrink=shrink) for name in TRAINING for shrink in SCALES]
    model = Denoiser(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations, pct_start=0.05)
    started, losses = time.monotonic(), []
    for iteration in range(1, iterations + 1):
        clean, noisy = sample(clips, rng, batch, steps, crop)
        denoised, _ = run_sequence(model, noisy)
        loss = torch.mean((denoised - clean) ** 2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if iteration % 200 == 0 or iteration == iterations:
            decibel = -10 * np.log10(np.mean(losses[-200:]))
            click.echo(f"{iteration:6d}  training PSNR {decibel:.2f} dB  {time.monotonic() - started:.0f} s")
    save_checkpoint(model, output, family="denoiser", arguments={"hidden": hidden})
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
