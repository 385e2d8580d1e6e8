"""`stepcell verify`: a model over many fed-back steps against its reference."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from stepcell import __version__
from stepcell.cli.common import backend_option, joined, json_option, no_check_option, overwrite_option, parse_size
from stepcell.cli.console import log, print_json, table, working
from stepcell.cli.pixel_options import pixel_options, pop_pixels
from stepcell.contract import StepContract
from stepcell.errors import InputError, ParityError, UsageError
from stepcell.files import read_bytes, write_atomic
from stepcell.onnx_model import read_onnx
from stepcell.optional_imports import require
from stepcell.overwrite import check_folder, check_output, is_marked, is_reference
from stepcell.pixels import changes, declare
from stepcell.shapes import parse_shapes

if TYPE_CHECKING:
    from stepcell.runtime.engine.sidecar import Sidecar
    from stepcell.runtime.verify.clips import Clip
    from stepcell.runtime.verify.place import Place
    from stepcell.runtime.verify.recorded import RecordedRun
    from stepcell.runtime.verify.results import Report
    from stepcell.runtime.verify.stepper import Stepper
    from stepcell.runtime.verify.verification import Findings, Reference, VerifyOptions

__all__ = ["command"]

ROWS = 3
WRITTEN = "written"  # --device: no device at all, but NumPy, rounded where the file says so
_ENGINES = (".engine", ".plan", ".trt")
_MARKS = {True: "pass", False: "FAIL", None: "-"}


@click.command(
    epilog="""\b
Examples:
  stepcell verify model.onnx
  stepcell verify model.onnx --against denoiser.safetensors --input clip.mp4 --report page.html
  stepcell verify model.onnx --against denoiser.safetensors --record reference.npz
  stepcell verify model.engine --against reference.npz
  stepcell verify model.engine --steps 1000 --device cuda:0 --json
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FILE",
    help="The reference: a checkpoint, another .onnx, or a .npz that --record wrote.  [default: the model's own graph "
    "in float64]",
)  # fmt: skip
@click.option(
    "-i", "--input", "input_text", default="random", show_default=True, metavar="CLIP",
    help="A video, a folder, a .npy, a file of events, or random values in the model's range.",
)  # fmt: skip
@click.option("--size", "size_text", metavar="WxH", help="Size of the sensor, if a file of events does not state it.")
@click.option("--event-stream", metavar="NAME", help="Which of several streams of a file of events.")
@pixel_options
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random input.")
@click.option(
    "--shape",
    multiple=True,
    callback=joined,
    metavar="x:1x3x64x64",
    help="Sizes of random input.  [default: pictures of 64 at most]",
)
@click.option(
    "--steps", type=click.IntRange(2), default=100, show_default=True, help="Steps of the free run.", metavar="N"
)
@click.option(
    "--warm-up", "warm_up", type=click.IntRange(0), default=4096, show_default=True, metavar="N",
    help="Maximum number of steps of the reference with the last frame held, until its states stop moving.",
)  # fmt: skip
@click.option(
    "--warm-seconds", type=click.FloatRange(0), default=60.0, show_default=True, metavar="S",
    help="Maximum time for --warm-up, in seconds.",
)  # fmt: skip
@click.option(
    "--device", metavar="DEVICE",
    help="cuda, cuda:N or cpu (ONNX Runtime); written: the ONNX file as the standard computes it, in NumPy, rounded "
    "where it says float16.  [default: cuda for an engine, written for an .onnx]",
)  # fmt: skip
@backend_option
@click.option("--keep-float16", is_flag=True, help="With --device cpu, run a float16 model in float16 too.")
@no_check_option
@click.option(
    "--tolerance", type=click.FloatRange(0, min_open=True), metavar="T",
    help="Largest absolute difference of an output.  [default: derived from the reference]",
)  # fmt: skip
@click.option(
    "--record", "record_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.npz",
    help="Record the reference to this file, for a machine without it, and verify nothing.",
)  # fmt: skip
@click.option(
    "--report", "report_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.html",
    help="Write an HTML page with verdicts, tables and plots.",
)  # fmt: skip
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="F.svg",
    help="Write the error growth as a picture: .svg, or .png where matplotlib is installed.",
)  # fmt: skip
@overwrite_option
@json_option
def command(
    model: Path,
    against: Path | None,
    input_text: str,
    size_text: str | None,
    event_stream: str | None,
    seed: int,
    shape: str | None,
    steps: int,
    warm_up: int,
    warm_seconds: float,
    device: str | None,
    backend: str,
    keep_float16: bool,
    check_file: bool,
    tolerance: float | None,
    record_path: Path | None,
    report_path: Path | None,
    plot_path: Path | None,
    overwrite: bool,
    as_json: bool,
    **pixel_arguments: Any,
) -> None:
    """Verify MODEL, an .onnx file or an engine, over many steps with its states fed back.

    MODEL and its reference run in lockstep, each feeding back its own states. The verdicts say how the error grows,
    whether single-step errors predict it or a state stalls, how large it can be in a run of any length, and whether
    states are stored and computed precisely enough, matter, are not swapped, and reset and resume exactly. The exit
    code is 3 if a verdict fails. The sidecar of an engine records the result: `stepcell inspect` shows it, `stepcell
    run --require-verified` requires it.
    """
    from stepcell.cli.plots import check_plot
    from stepcell.runtime.verify.clips import source_clip
    from stepcell.runtime.verify.recorded import record_reference, verify_recorded, write_record
    from stepcell.runtime.verify.verification import VerifyOptions, verify

    check_plot(plot_path)
    pixels = pop_pixels(pixel_arguments)
    reads: dict[str | Path, str] = {model: "the model", input_text: "--input"}
    if against is not None:
        reads[against] = "--against"
    for option, path in {"--record": record_path, "--report": report_path, "--plot": plot_path}.items():
        if path is not None:
            ours = is_reference if option == "--record" else is_marked
            check_output(path, ours, reads=reads, option=option, overwrite=overwrite)
            check_folder(path, option=option)
            reads[path] = option
    is_engine = model.suffix.lower() in _ENGINES
    onnx, contract, sidecar = _opened(model, check_file=check_file)
    if against is not None and against.suffix.lower() == ".onnx":
        read_onnx(against, check=check_file)
    layers = () if sidecar is None else sidecar.layers
    options = VerifyOptions(
        steps=steps, still=warm_up, warm_seconds=warm_seconds, tolerance=tolerance, rows=_most_rows(contract, sidecar)
    )
    recorded = _recorded(against, contract)
    if recorded is None:
        declared = declare(contract, pixels)
        for change in changes(contract, declared):
            log(f"pixels:    {change}")
        if input_text != "random" and shape is not None:
            raise UsageError("--shape: is for random input; a clip has its own size")
        if input_text != "random":
            size = None if size_text is None else parse_size(size_text)
            clip = source_clip(declared, input_text, size=size, event_stream=event_stream)
        elif size_text is not None or event_stream is not None:
            raise UsageError("--size, --event-stream: are for a file of events (--input)")
        else:
            clip = _random_clip(declared, sidecar, seed, shape)
    elif input_text != "random" or size_text or event_stream or shape is not None or record_path is not None or pixels:
        raise UsageError(
            f"--against {against}: brings its own input; --input, --shape, --range and --record do not fit"
        )
    else:
        clip = recorded.clip
    if record_path is not None:
        with working(f"recording {record_path}"):
            reference, _ = _reference(onnx, against, contract, None)
            record, arrays = record_reference(reference, clip, options)
            write_record(record_path, record, arrays)
        log(f"recorded {record_path}: {record.steps} steps of {record.reference}, {record.warm_up} to warm up")
        return
    device = device or ("cuda" if is_engine else WRITTEN)
    with _subject(model, device, backend, keep_float16=keep_float16) as (subject, where):
        log(f"{model}: {subject.name}")
        with working(f"verifying {model}"):
            if recorded is not None:
                findings, name = verify_recorded(subject, recorded, options, layers), recorded.record.reference
            else:
                reference, own = _reference(onnx, against, contract, subject if device == WRITTEN else None)
                log(f"reference: {reference.exact.name}")
                findings = verify(subject, reference, clip, options, in_float64=own, layers=layers)
                name = reference.exact.name
    report = _report(model, against, findings, options, clip, subject.name, name, where)
    report = msgspec.structs.replace(report, layers=layers)
    _show(report)
    _write(report, report_path, plot_path)
    if is_engine:
        _remember(model, report, where)
    if as_json:
        print_json(report)
    wrong = [verdict for verdict in report.verdicts if verdict.passed is False]
    if wrong:
        raise ParityError(f"{model}: failed: {', '.join(verdict.name for verdict in wrong)}: {wrong[0].says}")


def _opened(model: Path, *, check_file: bool) -> tuple[Path | None, StepContract, Sidecar | None]:
    """The ONNX file, where there is one, the contract, and the sidecar of an engine."""
    from stepcell.runtime.engine.engine_check import read_engine

    if model.suffix.lower() == ".onnx":
        return model, read_onnx(model, check=check_file).contract, None
    if model.suffix.lower() not in _ENGINES:
        raise UsageError(f"{model}: expected an .onnx file or an engine ({', '.join(_ENGINES)})")
    _, sidecar = read_engine(model)
    beside = model.parent / sidecar.onnx
    if beside.is_file() and hashlib.sha256(read_bytes(beside)).hexdigest() != sidecar.fingerprint.onnx_sha256:
        raise InputError(f"{beside}: is not the file that {model.name} was built from: its SHA-256 differs")
    return beside if beside.is_file() else None, sidecar.contract, sidecar


def _recorded(against: Path | None, contract: StepContract) -> RecordedRun | None:
    from stepcell.runtime.verify.recorded import read_record

    return read_record(against, contract) if against is not None and against.suffix.lower() == ".npz" else None


def _most_rows(contract: StepContract, sidecar: Sidecar | None) -> int:
    """Number of batch rows for the isolation check: three, or the fixed batch of an engine."""
    if sidecar is None or not contract.states:
        return ROWS
    state = contract.states[0]
    profile = sidecar.profiles.get(state.input)
    return ROWS if profile is None or state.batch_axis is None else min(ROWS, profile.max[state.batch_axis])


def _random_clip(contract: StepContract, sidecar: Sidecar | None, seed: int, shape: str | None) -> Clip:
    from stepcell.runtime.verify.clips import random_clip, sizes_for

    tuned = {} if sidecar is None else sidecar.profiles
    shapes = {spec.name: tuned[spec.name].opt for spec in contract.inputs if spec.name in tuned}
    if shape:
        shapes = parse_shapes(shape, option="--shape")
    return random_clip(contract, sizes_for(contract, shapes), seed=seed)


@contextlib.contextmanager
def _subject(model: Path, device: str, backend: str, *, keep_float16: bool) -> Iterator[tuple[Stepper, Place]]:
    """What is verified, and where it runs."""
    from stepcell.runtime.loop.step_loop import StepLoop
    from stepcell.runtime.verify.place import Place, place_of
    from stepcell.runtime.verify.references import as_written
    from stepcell.runtime.verify.stepper import LoopStepper

    if device == WRITTEN:
        if model.suffix.lower() in _ENGINES:
            raise UsageError("--device written: is for an .onnx file; an engine runs on a GPU")
        yield as_written(model), Place("NumPy, as written")
        return
    options = {"check_finite": False, "check_file": False, "keep_float16": keep_float16}
    with StepLoop.open(model, device, backend=backend, **options) as loop:
        yield LoopStepper(loop), place_of(loop.device)


def _reference(
    onnx: Path | None, against: Path | None, contract: StepContract, written: Stepper | None
) -> tuple[Reference, Stepper | None]:
    """The reference, and the model's own graph in float64 where it is to be compared with one.

    Args:
        written: the subject, where it is the file as written and so no peer of itself.
    """
    from stepcell.runtime.verify.references import as_written, in_float64
    from stepcell.runtime.verify.verification import Reference

    if against is None or against.suffix.lower() == ".onnx":
        path = against or onnx
        if path is None:
            raise InputError("the ONNX file that the engine was built from is not beside it", hint="name it: --against")
        exact = in_float64(path)
        same = exact.contract.precision == contract.precision
        peer = as_written(path) if same and (written is None or against is not None) else None
        compared = against is not None and onnx is not None and same
        return Reference(exact, peer, exact if compared else None), in_float64(onnx) if compared and onnx else None
    if any(spec.converts for spec in contract.inputs):
        raise UsageError(
            f"--against {against}: the file takes bytes, and the module floats",
            hint="verify the file that was exported without --pixels uint8; export and fuse compared the two",
        )
    for package in ("torch", "onnx"):
        require(package, extra="export", purpose=f"comparing with {against}")
    from stepcell.exporter.module_step import module_jvp, module_step
    from stepcell.exporter.reference import load_module
    from stepcell.runtime.verify.stepper import FunctionStepper

    module = load_module(contract, against)
    exact = FunctionStepper(
        module_step(module, contract), contract, f"{against.name} in torch, float64",
        jvp=module_jvp(module, contract), wide=True,
    )  # fmt: skip
    narrow = FunctionStepper(
        module_step(module, contract, precision=contract.precision), contract, "the same, weights rounded", wide=True
    )
    peer = None if written is not None or onnx is None else as_written(onnx)
    return Reference(exact, peer, narrow), None if onnx is None else in_float64(onnx)


def _report(
    model: Path,
    against: Path | None,
    findings: Findings,
    options: VerifyOptions,
    clip: Clip,
    subject: str,
    reference: str,
    where: Place,
) -> Report:
    import numpy as np

    from stepcell.runtime.verify.results import Report
    from stepcell.runtime.verify.verification import now

    versions = {"stepcell": __version__, "numpy": np.__version__}
    if where.driver:
        versions["driver"] = where.driver
    return Report(
        model=model.name,
        reference=str(against.name if against is not None else reference),
        subject_runs=subject,
        reference_runs=reference,
        device=where.name,
        input=clip.name,
        shapes=clip.shapes,
        steps=findings.growth[0].steps[-1] if findings.growth else options.steps,
        warm_up=findings.warm_up,
        model_sha256=hashlib.sha256(read_bytes(model)).hexdigest(),
        date=now(),
        versions=versions,
        verdicts=tuple(findings.verdicts),
        growth=findings.growth,
        warm=findings.warm,
        seconds=round(findings.seconds, 3),
    )


def _show(report: Report) -> None:
    steps = [str(step) for step in report.growth[0].steps] if report.growth else []
    shares = [each for each in report.growth if each.is_share]
    rows = [[each.name, *(f"{error:.1e}" for error in each.rms)] for each in report.growth if not each.is_share]
    table("rms error after N steps", ["", *steps], rows)
    if shares:
        rows = [[each.name, *(f"{error:.2%}" for error in each.rms)] for each in shares]
        table("share of integers and booleans that differ by more than rounding", ["", *steps], rows)
    table("", ["", "", ""], [[_MARKS[v.passed], v.name, v.says] for v in report.verdicts])
    asked = [verdict for verdict in report.verdicts if verdict.passed is not None]
    wrong = [verdict for verdict in asked if not verdict.passed]
    answer = f"{len(wrong)} of {len(asked)} verdicts failed" if wrong else f"all {len(asked)} verdicts passed"
    log(f"verified {report.model}  {report.steps} steps on {report.device}  {report.seconds:.1f} s  {answer}")


def _write(report: Report, page_path: Path | None, plot_path: Path | None) -> None:
    from stepcell.runtime.verify.report.page import page

    if page_path is not None:
        write_atomic(page_path, page(report))
        log(f"report:  {page_path}")
    if plot_path is None:
        return
    from stepcell.cli.plots import write_growth

    write_growth(plot_path, report.growth)
    log(f"plot:    {plot_path}")


def _remember(engine: Path, report: Report, where: Place) -> None:
    from stepcell.runtime.engine.sidecar import Verification, read_sidecar, record_verification

    sidecar = read_sidecar(engine)
    record_verification(
        engine,
        Verification(
            passed=report.passed,
            failed=tuple(verdict.name for verdict in report.verdicts if verdict.passed is False),
            date=report.date,
            device=where.name,
            compute_capability=where.compute_capability,
            driver=where.driver,
            tensorrt=sidecar.fingerprint.tensorrt,
            steps=report.steps,
            input=report.input,
            reference=report.reference,
            stepcell=__version__,
            plan_sha256=sidecar.fingerprint.plan_sha256,
        ),
    )
