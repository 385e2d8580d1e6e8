"""Checks of an engine against its sidecar, the installed TensorRT and the device, before it is loaded.

TensorRT answers a plan that does not fit with a failed deserialisation and a log line, or with undefined
behaviour. These checks report both values of every difference.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stepcell.errors import EngineMismatchError
from stepcell.files import read_bytes
from stepcell.plugins.tensorrt.fields import plugin_identity
from stepcell.plugins.tensorrt.registry import register
from stepcell.runtime import cuda
from stepcell.runtime.engine.sidecar import Fingerprint, Sidecar, read_sidecar, rebuild_command, this_platform
from stepcell.runtime.engine.tensorrt_module import Messages, TensorRT, load_tensorrt, make_logger, no_collection

__all__ = ["CheckedEngine", "check_engine", "covers", "read_engine", "register_plugins"]


@dataclass(frozen=True)
class CheckedEngine:
    """An engine that passed the checks: the plan's bytes, the sidecar, and the TensorRT that loads it."""

    plan: bytes
    sidecar: Sidecar
    tensorrt: TensorRT


def read_engine(engine: Path) -> tuple[bytes, Sidecar]:
    """Read a plan and its sidecar and verify their checksums; needs neither TensorRT nor a GPU.

    Raises:
        InputError: the engine cannot be read.
        EngineMismatchError: plan or sidecar is missing, damaged or from another build.
    """
    plan = read_bytes(engine)
    sidecar = read_sidecar(engine)
    built = sidecar.fingerprint
    digest = hashlib.sha256(plan).hexdigest()
    if (digest, len(plan)) != (built.plan_sha256, built.plan_bytes):
        raise EngineMismatchError(
            f"{engine}: is not the file its sidecar describes: SHA-256 {built.plan_sha256} ({built.plan_bytes} bytes) "
            f"when it was built, {digest} ({len(plan)} bytes) now",
            hint=f"copy the engine and its .json again, or rebuild: {rebuild_command(sidecar, engine)}",
        )
    return plan, sidecar


def check_engine(engine: Path, *, device: int = 0) -> CheckedEngine:
    """Check everything that can be checked before TensorRT loads a plan.

    Args:
        device: CUDA number of the GPU that will run it; without such a GPU only the rest is checked.

    Raises:
        InputError: the engine cannot be read.
        EngineMismatchError: plan, sidecar, TensorRT, platform or GPU do not match.
        MissingDependencyError: the TensorRT flavour that built it is not installed.
    """
    plan, sidecar = read_engine(engine)
    built = sidecar.fingerprint
    library = load_tensorrt(built.flavor)
    differences = _differences(built, library, sidecar.options.version_compatible)
    gpu = next((found for found in cuda.discover().devices if found.index == device), None)
    target = None
    if gpu is not None and not _runs_on(gpu, built, plan, library):
        target, built_for = gpu.compute_capability, ", ".join(built.compute_capabilities)
        differences.append(f"built for compute capability {built_for}, {gpu.name} has {target}")
    if differences:
        raise EngineMismatchError(
            f"{engine}: does not fit this machine: {'; '.join(differences)}",
            hint=f"rebuild: {rebuild_command(sidecar, engine, compute_capability=target)}",
        )
    return CheckedEngine(plan, sidecar, library)


def register_plugins(checked: CheckedEngine) -> None:
    """Register the plugin that a plan needs before TensorRT can load it.

    Raises:
        PluginError: TensorRT refuses the plugin.
    """
    if checked.sidecar.fingerprint.plugin_version is not None:
        register(checked.tensorrt.module)


def covers(targets: tuple[str, ...], capability: str) -> bool:
    """Whether an engine built for `targets` runs on a GPU of this compute capability."""
    for target in targets:
        if target == capability or (target.endswith("+") and _numbers(capability) >= _numbers(target[:-1])):
            return True
    return False


def _differences(built: Fingerprint, library: TensorRT, version_compatible: bool) -> list[str]:
    found = []
    newer = version_compatible and _numbers(library.version) >= _numbers(built.tensorrt)
    if library.version != built.tensorrt and not newer:
        found.append(f"built with {library.name} {built.tensorrt}, {library.version} is installed")
    here = this_platform()
    # By documentation TensorRT-RTX plans are portable between Linux and Windows, but not between architectures.
    compared = (lambda name: name.partition("-")[2]) if library.is_rtx else str
    if compared(built.platform) != compared(here):
        found.append(f"built on {built.platform}, this is {here}")
    if built.plugin_version is not None:
        own = plugin_identity()
        if built.plugin_version != own.version:
            found.append(f"built with plugin version {built.plugin_version}, this stepcell has {own.version}")
        elif built.plugin_sha256 != own.sha256:
            found.append(f"built with plugin interface {built.plugin_sha256}, this stepcell has {own.sha256}")
    return found


@no_collection()
def _runs_on(gpu: cuda.Gpu, built: Fingerprint, plan: bytes, library: TensorRT) -> bool:
    """Whether an engine runs on a GPU: by the fingerprint, for TensorRT-RTX also by its own check."""
    if covers(built.compute_capabilities, gpu.compute_capability) or not library.is_rtx:
        return covers(built.compute_capabilities, gpu.compute_capability)
    cuda.use_device(gpu.index)  # the check applies to the current device
    trt = library.module
    runtime = trt.Runtime(make_logger(trt, Messages()))
    validity, _ = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    return bool(validity != trt.EngineValidity.INVALID)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
