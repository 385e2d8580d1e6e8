"""Build of an engine: ONNX file to TensorRT plan with its sidecar."""

from __future__ import annotations

import hashlib
import logging
import time
from functools import partial
from pathlib import Path

import msgspec

from stepcell.errors import DeviceError, OutputError, UsageError
from stepcell.files import atomic_path, read_bytes, write_atomic
from stepcell.onnx_model import read_onnx
from stepcell.overwrite import check_output, is_engine, is_no_model, is_sidecar
from stepcell.runtime import cuda
from stepcell.runtime.engine.options import BuildOptions, check_options
from stepcell.runtime.engine.parser_model import for_parser
from stepcell.runtime.engine.plan import build_plan
from stepcell.runtime.engine.plugin_choice import choose_plan
from stepcell.runtime.engine.profile import data_shapes, derive_profiles
from stepcell.runtime.engine.sidecar import Fingerprint, Sidecar, sidecar_path, this_platform
from stepcell.runtime.engine.tensorrt_module import TensorRT, load_tensorrt

__all__ = ["EngineInfo", "build_engine"]

logger = logging.getLogger(__name__)

# Targets that TensorRT-RTX builds for by default, according to its documentation: later GPUs included, Turing (7.5)
# not. Passing these four explicitly would exclude later ones.
RTX_DEFAULT = ("8.0", "8.6", "8.9", "12.0+")


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a build.

    Attributes:
        engine: path of the engine.
        sidecar: path of its sidecar.
        warnings: TensorRT's warnings.
        contents: the sidecar.
    """

    engine: str
    sidecar: str
    warnings: tuple[str, ...]
    contents: Sidecar


def build_engine(
    onnx: str | Path,
    engine: str | Path,
    options: BuildOptions | None = None,
    *,
    check_file: bool = True,
    overwrite: bool = False,
) -> EngineInfo:
    """Build an engine from an exported model; both files are moved into place once everything has succeeded.

    Choices that are made for the user are logged.

    Args:
        onnx: a model exported by stepcell, with its contract in the metadata.
        engine: path of the plan to write; the sidecar is written beside it.
        options: None: the defaults, for the flavour's default GPUs.
        check_file: refuse a model whose graph, weights or contract have changed since its export.
        overwrite: replace existing files that no build wrote.

    Raises:
        InputError, ContractError: the model cannot be read, has no contract, or has changed since its export.
        UsageError: an option does not fit the model or the flavour, or an output is an input or a foreign
            file.
        MissingDependencyError: TensorRT is not installed.
        PluginError: the plugin was required and is not available.
        DeviceError: the flavour builds on a GPU and there is none.
        BuildError: TensorRT refused the model.
        OutputError: the files cannot be written.
    """
    onnx, engine, options = Path(onnx), Path(engine), options or BuildOptions()
    library = load_tensorrt(options.flavor)
    check_options(options, library)
    reads: dict[str | Path, str] = {onnx: "the model"}
    check_output(engine, is_engine, reads=reads, overwrite=overwrite)
    check_output(sidecar_path(engine), is_sidecar, reads=reads, overwrite=overwrite)
    if options.timing_cache is not None:
        reads |= {engine: "--output", sidecar_path(engine): "the sidecar"}
        check_output(
            Path(options.timing_cache), is_no_model, reads=reads, option="--timingCacheFile", overwrite=overwrite
        )
    file = read_onnx(onnx, check=check_file)
    profiles = derive_profiles(file.contract, options)
    targets = _targets(library, options)
    cache = _timing_cache(library, options)
    timings = None if cache is None else read_bytes(cache) if cache.is_file() else b""
    if file.contract.symbols and not (options.min_shapes or options.opt_shapes or options.max_shapes):
        sizes = data_shapes(file.contract, profiles)
        logger.info(f"sizes:   {sizes}, as exported; others: --minShapes, --optShapes, --maxShapes")

    # The sidecar is moved into place first and the plan last: after a crash between the two, the plan does not match
    # the sidecar's fingerprint and is refused. Opening both here also checks the output folder before the build.
    with atomic_path(engine) as plan_file, atomic_path(sidecar_path(engine)) as sidecar_file:
        started = time.perf_counter()
        build = partial(build_plan, library, profiles=profiles, options=options, timing_cache=timings)
        plan, plugin = choose_plan(library, for_parser(file), profiles, options, targets[0], build)
        seconds = time.perf_counter() - started
        identity = plan.source.identity
        fingerprint = Fingerprint(
            flavor=library.flavor,
            tensorrt=library.version,
            compute_capabilities=targets,
            platform=this_platform(),
            plugin_version=None if identity is None else identity.version,
            plugin_sha256=None if identity is None else identity.sha256,
            onnx_sha256=file.sha256,
            plan_sha256=hashlib.sha256(plan.data).hexdigest(),
            plan_bytes=len(plan.data),
        )
        sidecar = Sidecar(
            onnx=onnx.name,
            fingerprint=fingerprint,
            profiles=profiles,
            options=options,
            compute_layers=plan.compute_layers,
            build_seconds=round(seconds, 3),
            contract=file.contract,
            plugin=plugin,
            fp16_mirrors=plan.source.fp16_mirrors,
            layers=plan.layers,
        ).sealed()
        plan_file.write_bytes(plan.data)
        sidecar_file.write_text(sidecar.to_json())
    if cache is not None and plan.timing_cache is not None:
        write_atomic(cache, plan.timing_cache)
    return EngineInfo(
        engine=str(engine),
        sidecar=str(sidecar_path(engine)),
        warnings=plan.warnings,
        contents=sidecar,
    )


def _timing_cache(library: TensorRT, options: BuildOptions) -> Path | None:
    if options.timing_cache is None:
        return None
    if library.is_rtx:
        logger.warning("warning: --timingCacheFile is ignored: TensorRT-RTX times nothing while it builds")
        return None
    path = Path(options.timing_cache)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist")
    return path


def _targets(library: TensorRT, options: BuildOptions) -> tuple[str, ...]:
    """Compute capabilities that the engine will run on."""
    asked = options.compute_capabilities
    if library.is_rtx:
        known = [name for name in library.module.ComputeCapability.__members__ if name.startswith("SM")]
        supported = {f"{name[2:-1]}.{name[-1]}": name for name in known}
        unknown = [target for target in asked if target not in supported]
        if unknown:
            raise UsageError(
                f"--compute-capability: {library.name} {library.version} does not build for {', '.join(unknown)} "
                f"(it does for {', '.join(supported)})"
            )
        return asked or RTX_DEFAULT
    found = cuda.discover()
    if not found.devices:
        raise DeviceError(
            f"{library.name} builds on the GPU that will run the engine, and there is none: {found.problem}",
            hint="build on the device itself; --flavor tensorrt-rtx builds for RTX cards with no GPU",
        )
    here = found.devices[0]
    if asked and asked != (here.compute_capability,):
        raise UsageError(
            f"--compute-capability: {library.name} builds only for the GPU it runs on "
            f"({here.name}: {here.compute_capability}), got {', '.join(asked)}",
            hint="omit it, and build on the target device",
        )
    return (here.compute_capability,)
