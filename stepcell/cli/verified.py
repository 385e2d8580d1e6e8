"""Verification recorded in an engine's sidecar, for `stepcell run`."""

from __future__ import annotations

from pathlib import Path

from stepcell.cli.console import log
from stepcell.errors import StepcellError, UsageError

__all__ = ["check_verified"]


def check_verified(model: Path, device: str, *, required: bool) -> None:
    """Log where an engine was verified, if it was.

    Args:
        device: the one that will run it.
        required: refuse an engine that was not verified on this device with this driver.

    Raises:
        UsageError: required of an .onnx file, which keeps no such record.
        ParityError: required, and there is no record of it, or it failed.
    """
    from stepcell.runtime.engine.sidecar import read_sidecar, require_verified
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES
    from stepcell.runtime.verify.place import place_of

    if model.suffix.lower() not in ENGINE_SUFFIXES:
        if required:
            raise UsageError(
                f"--require-verified: {model} keeps no record; an engine's sidecar does",
                hint="verify the file where it is used: `stepcell verify` ends with exit code 3 if it fails",
            )
        return
    try:
        sidecar = read_sidecar(model)
    except StepcellError:  # reported when the engine is opened
        if required:
            raise
        return
    place = place_of(device)
    if required:
        log(f"verified: {require_verified(sidecar, model, device=place.name, driver=place.driver)}")
    elif sidecar.verified:
        here = [each for each in sidecar.verified if each.device == place.name]
        log(f"verified: {(here or sidecar.verified)[-1]}")
    else:
        log(f"verified: never; `stepcell verify {model}` does it on this device")
