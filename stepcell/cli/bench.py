"""`stepcell bench`: models side by side, for several numbers of streams."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from stepcell.cli.common import backend_option, joined, json_option, no_check_option, overwrite_option
from stepcell.cli.console import log, print_json, table, working
from stepcell.errors import UsageError
from stepcell.files import write_atomic
from stepcell.json_text import json_text
from stepcell.overwrite import check_folder, check_output, is_marked, is_report
from stepcell.shapes import parse_shapes

if TYPE_CHECKING:
    from stepcell.contract import StepContract
    from stepcell.runtime.benchmark.bench import BenchReport, Contender, Effort, ModelTimes, Times
    from stepcell.runtime.benchmark.floor import Floor, Machine

__all__ = ["command"]

_FRAMES = 4  # random frames, used in turn


@click.command(
    epilog="""\b
Examples:
  stepcell bench model.onnx
  stepcell bench model.onnx --streams 1,2,4,8 --plot throughput.svg
  stepcell bench old.onnx new.onnx --shape x:1x3x128x128 --threads 1
  stepcell bench model.engine --device cuda --iterations 1000 --warmUp 500 --exportTimes times.json
"""
)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="MODEL",
    help="Baseline of the ratios.  [default: the first model]",
)  # fmt: skip
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda for an engine, cpu for an .onnx]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads for one step.  [default: one per core]")
@backend_option
@click.option("--keep-float16", is_flag=True, help="On a CPU, run a float16 model in float16 too.")
@no_check_option
@click.option(
    "--shape",
    "--shapes",
    "shape",
    multiple=True,
    callback=joined,
    metavar="x:1x3x256x256",
    help="Sizes of one stream.  [default: as exported or tuned]",
)
@click.option(
    "--streams",
    "streams_text",
    default="1",
    show_default=True,
    metavar="1,2,4,8",
    help="Numbers of streams (batch rows) to time.",
)
@click.option(
    "--steps", "--iterations", "steps", type=click.IntRange(2), default=50, show_default=True, metavar="N",
    help="Minimum number of timed steps.",
)  # fmt: skip
@click.option(
    "--duration", type=click.FloatRange(0), default=2.0, show_default=True, metavar="S",
    help="Minimum seconds for each model and number of streams.",
)  # fmt: skip
@click.option(
    "--warmUp", "--warm-up", "warm_up", type=click.FloatRange(0), default=200, show_default=True, metavar="MS",
    help="Milliseconds of untimed steps before the measurement.",
)  # fmt: skip
@click.option(
    "--percentile",
    "percentile_text",
    default="50,90,95,99",
    show_default=True,
    metavar="P1,P2,...",
    help="Percentiles to report.",
)
@click.option("--no-floor", is_flag=True, help="Do not measure the peak rates of the processor.")
@click.option(
    "--exportTimes", "--export-times", "times_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.json",
    help="Write the report with the time of every step.",
)  # fmt: skip
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.svg",
    help="Write throughput over streams as a picture.",
)  # fmt: skip
@overwrite_option
@json_option
def command(
    models: tuple[Path, ...],
    against: Path | None,
    device: str | None,
    threads: int | None,
    backend: str,
    keep_float16: bool,
    check_file: bool,
    shape: str | None,
    streams_text: str,
    steps: int,
    duration: float,
    warm_up: float,
    percentile_text: str,
    no_floor: bool,
    times_path: Path | None,
    plot_path: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Time the steps of one model or several, on random frames.

    Several models are timed in one process, in a random order per round, and compared within a round: ratios stay
    valid on a busy machine, where absolute times do not. A time is that of `StepLoop.step`, from
    frames on the host to outputs on the host. The floor is the time that the step's bytes and operations would take at
    the peak rates measured on this processor.
    """
    from stepcell.cli.plots import check_svg
    from stepcell.runtime.benchmark.bench import Effort

    check_svg(plot_path)
    reads: dict[str | Path, str] = {} if against is None else {against: "--against"}
    reads |= dict.fromkeys(models, "a model")
    if plot_path is not None:
        check_output(plot_path, is_marked, reads=reads, option="--plot", overwrite=overwrite)
        check_folder(plot_path, option="--plot")
        reads[plot_path] = "--plot"
    if times_path is not None:
        check_output(times_path, is_report, reads=reads, option="--exportTimes", overwrite=overwrite)
        check_folder(times_path, option="--exportTimes")
    effort = Effort(
        warm_up=warm_up / 1e3,
        steps=steps,
        seconds=duration,
        percentiles=tuple(_numbers(percentile_text, "--percentile", 0, 100)),
    )
    streams = [int(each) for each in _numbers(streams_text, "--streams", 1, 4096)]
    paths = [against, *models] if against is not None else list(models)
    report = _measured(
        paths,
        device,
        threads,
        shape,
        streams,
        effort,
        backend=backend,
        keep_float16=keep_float16,
        check_file=check_file,
        floor=not no_floor,
    )
    _show(report, effort)
    if plot_path is not None:
        write_atomic(plot_path, _plot(report))
        log(f"plot:    {plot_path}")
    if times_path is not None:
        write_atomic(times_path, json_text(report) + "\n")
        log(f"times:   {times_path}")
    if as_json:
        print_json(_without_times(report))


def _numbers(text: str, option: str, low: float, high: float) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not low <= each <= high for each in found):
        raise UsageError(f"{option}: expected numbers from {low:g} to {high:g} with commas between, got {text!r}")
    return found


def _measured(
    paths: Sequence[Path],
    device: str | None,
    threads: int | None,
    shape: str | None,
    streams: Sequence[int],
    effort: Effort,
    *,
    backend: str,
    keep_float16: bool,
    check_file: bool,
    floor: bool,
) -> BenchReport:
    from stepcell.machine import cpu_name
    from stepcell.runtime.benchmark.bench import (
        BenchReport,
        Contender,
        ModelTimes,
        load_average,
        measure,
        versions,
    )
    from stepcell.runtime.benchmark.copies import parts_of
    from stepcell.runtime.benchmark.floor import measure_machine
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES
    from stepcell.runtime.loop.step_loop import StepLoop
    from stepcell.runtime.verify.clips import random_clip
    from stepcell.runtime.verify.verification import now

    before = load_average()
    on_cpu = all(path.suffix.lower() not in ENGINE_SUFFIXES for path in paths) and device in (None, "cpu")
    machine = measure_machine(threads) if floor and on_cpu else None
    with contextlib.ExitStack() as stack:
        contenders, found, single = [], [[] for _ in paths], []  # type: ignore[var-annotated]
        for path in paths:
            place = device or ("cuda" if path.suffix.lower() in ENGINE_SUFFIXES else "cpu")
            loop = stack.enter_context(
                StepLoop.open(
                    path, place, threads=threads, backend=backend, keep_float16=keep_float16, check_file=check_file
                )
            )
            contenders.append(Contender(path.name, loop, []))
            single.append(_sizes(path, loop.contract, shape, 1))
            log(f"{path}: {loop.description}")
        for count in streams:
            with working(f"{count} stream{'s' * (count > 1)}"):
                for path, contender in zip(paths, contenders, strict=True):
                    sizes = _sizes(path, contender.loop.contract, shape, count)
                    contender.loop.reset()
                    contender.frames = random_clip(contender.loop.contract, sizes, count=_FRAMES).frames
                for index, times in enumerate(measure(contenders, count, effort)):
                    times = _with_floor(times, paths[index], contenders[index], shape, machine)
                    if paths[index].suffix.lower() in ENGINE_SUFFIXES:
                        parts = parts_of(contenders[index].loop, contenders[index].frames, effort.steps)
                        times = msgspec.structs.replace(times, parts=parts)
                    found[index].append(times)
        results = [
            ModelTimes(
                name=path.name,
                runs=contender.loop.description,
                shapes=random_clip(contender.loop.contract, sizes, count=1).shapes,
                times=tuple(times),
            )
            for path, contender, times, sizes in zip(paths, contenders, found, single, strict=True)
        ]
    import os

    return BenchReport(
        date=now(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        versions=versions(),
        transfers="frames on the host in, outputs on the host out",
        models=tuple(results),
        machine=machine,
        load=(before, load_average()),
    )


def _sizes(path: Path, contract: StepContract, shape: str | None, streams: int) -> dict[str, int]:
    """A value of every symbol: as asked for, else as an engine was tuned or a file exported, with this batch."""
    from stepcell.errors import InputError
    from stepcell.runtime.engine.sidecar import read_sidecar
    from stepcell.runtime.loop.open_backend import ENGINE_SUFFIXES
    from stepcell.runtime.verify.clips import sizes_for

    shapes = parse_shapes(shape, option="--shape") if shape else {}
    if not shapes and path.suffix.lower() in ENGINE_SUFFIXES:
        profiles = read_sidecar(path).profiles
        shapes = {spec.name: profiles[spec.name].opt for spec in contract.inputs if spec.name in profiles}
    sizes = sizes_for(contract, shapes)
    batch = {dim for state in contract.states if isinstance(dim := state.streams, str)}
    if not shapes:
        sizes |= {symbol: contract.example.get(symbol, size) for symbol, size in sizes.items() if symbol not in batch}
    if streams > 1 and not batch:
        raise InputError(f"{path}: its batch is fixed, so it cannot be timed with {streams} streams")
    return sizes | dict.fromkeys(batch, streams) if streams > 1 or not shapes else sizes


def _with_floor(times: Times, path: Path, contender: Contender, shape: str | None, machine: Machine | None) -> Times:
    from stepcell.runtime.benchmark.floor import floor, work_of

    if machine is None or path.suffix.lower() != ".onnx":
        return times
    contract = contender.loop.contract
    work = work_of(path, contract, _sizes(path, contract, shape, times.streams))
    return msgspec.structs.replace(times, floor=floor(work, machine))


def _show(report: BenchReport, effort: Effort) -> None:
    percents = [f"{q:g}" for q in effort.percentiles]
    rows = []
    for model in report.models:
        for times in model.times:
            ratio = "1" if times.ratio is None else _ratio(times)
            best = "" if times.floor is None else _floor(times, times.floor)
            rows.append([
                model.name,
                str(times.streams),
                f"{times.first_ms:.2f}",
                *(f"{times.percentiles_ms[q]:.2f}" for q in percents),
                f"{times.frames_per_second:.1f}",
                ratio,
                best,
            ])  # fmt: skip
    columns = ["model", "streams", "first ms", *(f"p{q} ms" for q in percents), "frames/s", "times as fast", "floor ms"]
    table("", columns, rows)
    if report.machine is not None:
        machine = report.machine
        log(
            f"floor: {machine.bytes_per_second / 1e9:.1f} GB/s of copying, "
            f"{machine.operations_per_second / 1e9:.0f} GFLOP/s of float32 matrix products, measured here"
        )
    for model in report.models:
        for times in model.times:
            if times.parts is not None:
                parts = times.parts
                log(
                    f"parts: {model.name}, {times.streams} streams: copy in {parts.copy_in_ms:.3f} ms, "
                    f"compute {parts.compute_ms:.3f} ms, copy out {parts.copy_out_ms:.3f} ms"
                )
    if max(report.load) > report.cores / 2:
        log(f"note:  the machine is busy (load {report.load[0]:.1f} to {report.load[1]:.1f} on {report.cores} cores)")
    best_model = max(report.models, key=_fastest)
    fastest = max(best_model.times, key=lambda times: times.frames_per_second)
    log(f"bench  {best_model.name}: {fastest.frames_per_second:.1f} frames/s with {fastest.streams} streams")


def _fastest(model: ModelTimes) -> float:
    return max(times.frames_per_second for times in model.times)


def _ratio(times: Times) -> str:
    assert times.ratio is not None
    low, high = times.ratio.quartiles
    return f"{times.ratio.median:.2f} ({low:.2f} to {high:.2f})"


def _floor(times: Times, floor: Floor) -> str:
    limit = "memory" if floor.memory_ms > floor.compute_ms else "compute"
    share = floor.milliseconds / times.percentiles_ms.get("50", times.mean_ms)
    return f"{floor.milliseconds:.2f} ({limit}, {share:.0%} of it)"


def _plot(report: BenchReport) -> str:
    from stepcell.runtime.verify.report.plot import Series, line_plot

    series = [
        Series(model.name, [t.streams for t in model.times], [t.frames_per_second for t in model.times])
        for model in report.models
    ]
    return line_plot("frames/s of all streams together", series, x_label="streams", y_label="")


def _without_times(report: BenchReport) -> BenchReport:
    """The report without the time of every step."""
    replace = msgspec.structs.replace
    models = [
        replace(model, times=tuple(replace(times, times_ms=()) for times in model.times)) for model in report.models
    ]
    return replace(report, models=tuple(models))
