"""Command `stepcell build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stepcell.cli.common import joined, json_option, no_check_option, overwrite_option
from stepcell.cli.console import log, print_json, stage, working
from stepcell.runtime.engine.build import EngineInfo, build_engine
from stepcell.runtime.engine.layers import int8_convolutions
from stepcell.runtime.engine.options import BuildOptions, parse_memory_pool, parse_targets
from stepcell.runtime.engine.profile import data_shapes
from stepcell.shapes import parse_shapes

_SHAPES = "NAME:AxBxC[,...]"


@click.command(
    epilog="""\b
Examples:
  stepcell build model.onnx
  stepcell build model.onnx -o model.engine --optShapes x:1x3x720x1280
  stepcell build model.onnx --minShapes x:1x3x64x64 --optShapes x:1x3x256x256 --maxShapes x:4x3x512x512
  stepcell build model.onnx --flavor tensorrt-rtx --compute-capability 8.6,8.9
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Engine to write [MODEL with .engine].")
@click.option(
    "--flavor",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="TensorRT that builds, and later runs, the engine; auto prefers tensorrt if it is installed.",
)
@click.option(
    "--plugin",
    type=click.Choice(["auto", "on", "off", "portable"]),
    default="auto",
    show_default=True,
    help="The fused gate kernel: auto uses it if it is faster (both variants are timed), on requires it, off never "
    "uses it, portable requires the form that other programs can load.",
)
@click.option(
    "--kernels",
    metavar="FOLDER",
    help="Folder of kernels from `stepcell kernels compile`; missing ones are added [the user's cache].",
)
@click.option(
    "--minShapes",
    "--min-shapes",
    "min_shapes",
    multiple=True,
    callback=joined,
    metavar=_SHAPES,
    help="Smallest sizes [--optShapes].",
)
@click.option(
    "--optShapes",
    "--opt-shapes",
    "opt_shapes",
    multiple=True,
    callback=joined,
    metavar=_SHAPES,
    help="Sizes to tune for [as exported].",
)
@click.option(
    "--maxShapes",
    "--max-shapes",
    "max_shapes",
    multiple=True,
    callback=joined,
    metavar=_SHAPES,
    help="Largest sizes [--optShapes].",
)
@click.option(
    "--compute-capability",
    metavar="8.6,8.9",
    help="GPUs to build for [TensorRT-RTX: 8.0, 8.6, 8.9, 12.0 and later; TensorRT: this machine's].",
)
@click.option(
    "--timingCacheFile",
    "--timing-cache-file",
    "timing_cache",
    metavar="FILE",
    help="Kernel timings to reuse and add to; TensorRT-RTX ignores it.",
)
@click.option(
    "--builderOptimizationLevel",
    "--builder-optimization-level",
    "optimization_level",
    type=click.IntRange(0, 5),
    help="0: fast build, 5: fast engine [TensorRT's default].",
)
@click.option(
    "--memPoolSize", "--mem-pool-size", "memory_pool", metavar="workspace:MiB", help="Limit of scratch memory."
)
@click.option(
    "--versionCompatible",
    "--version-compatible",
    "version_compatible",
    is_flag=True,
    help="The engine also loads in later TensorRT versions; not with TensorRT-RTX.",
)
@no_check_option
@click.option("--verbose", is_flag=True, help="Show all messages of TensorRT.")
@overwrite_option
@json_option
def command(
    model: Path,
    output: Path | None,
    flavor: Any,
    plugin: Any,
    kernels: str | None,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    compute_capability: str | None,
    timing_cache: str | None,
    optimization_level: int | None,
    memory_pool: str | None,
    version_compatible: bool,
    check_file: bool,
    verbose: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine from MODEL, a file that `stepcell export` wrote.

    The precision is that of the exported model. Shapes are given for data inputs only; those of the states
    follow. The contract and the fingerprint are written to a .json file beside the engine. TensorRT-RTX needs
    no GPU to build.
    """
    options = BuildOptions(
        flavor=flavor,
        plugin=plugin,
        kernels=kernels,
        min_shapes=parse_shapes(min_shapes, option="--minShapes") if min_shapes is not None else {},
        opt_shapes=parse_shapes(opt_shapes, option="--optShapes") if opt_shapes is not None else {},
        max_shapes=parse_shapes(max_shapes, option="--maxShapes") if max_shapes is not None else {},
        compute_capabilities=parse_targets(compute_capability) if compute_capability is not None else (),
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        workspace_mib=parse_memory_pool(memory_pool) if memory_pool is not None else None,
        version_compatible=version_compatible,
        verbose=verbose,
    )
    engine = output or model.with_suffix(".engine")
    with working(f"building {engine}"):
        info = build_engine(model, engine, options, check_file=check_file, overwrite=overwrite)
    _report(info)
    if as_json:
        print_json(info)


def _report(info: EngineInfo) -> None:
    built, fingerprint = info.contents, info.contents.fingerprint
    precision, layers = built.contract.precision, built.compute_layers
    total, right = sum(layers.values()), layers.get(precision, 0)
    log(f"layers:  {right} of {total} convolutions and matrix products in {precision}, by the types in the network")
    if right < total:
        others = ", ".join(f"{count} in {dtype}" for dtype, count in layers.items() if dtype != precision)
        log(f"warning: the model is {precision}, but {others}; check the casts in the graph")
    if built.contract.quantization:
        named = built.contract.quantization.layers
        found = int8_convolutions(built.layers, named)
        if built.layers:
            log(f"int8:    {len(found)} of {len(named)} quantised convolutions, as read back from the engine")
        if built.layers and len(found) < len(named):
            log(f"warning: not in int8: {', '.join(name for name in named if name not in found)}")
    if info.warnings:
        log(f"note:    TensorRT gave {len(info.warnings)} warnings; --verbose shows them")
    target = f"{fingerprint.flavor} {fingerprint.tensorrt} for {', '.join(fingerprint.compute_capabilities)}"
    stage("built", info.engine, built.build_seconds, f"{data_shapes(built.contract, built.profiles)}, {target}")
