"""run_streams: runs a model over inputs and writes its results, as `stepcell run` does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeVar, cast, get_args

from stepcell.errors import OutputError, UsageError
from stepcell.files import write_atomic
from stepcell.overwrite import is_report, is_snapshot
from stepcell.pixels import Declaration, changes, declare
from stepcell.runtime.loop.step_loop import StepLoop
from stepcell.runtime.media.events.bad_events import OnBadEvent
from stepcell.runtime.media.open_source import is_remote
from stepcell.runtime.media.preprocess import event_input, image_input
from stepcell.runtime.media.source import FRAME_RATES, display_name
from stepcell.runtime.streams.clip_folder import clip_outputs, find_clips
from stepcell.runtime.streams.deadline import Deadline, OnLate
from stepcell.runtime.streams.metrics import Metrics
from stepcell.runtime.streams.non_finite import OnNonFinite
from stepcell.runtime.streams.open_streams import (
    Audio,
    StreamOptions,
    check_names,
    open_streams,
    stream_names,
)
from stepcell.runtime.streams.output_clock import Timestamps
from stepcell.runtime.streams.progress import RunProgress
from stepcell.runtime.streams.report import RunError, RunReport, StreamReport
from stepcell.runtime.streams.reset_policy import OnSizeChange, ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.run_snapshots import SNAPSHOT_EVERY, SnapshotWriter, resume_streams
from stepcell.runtime.streams.scheduler import Scheduler
from stepcell.runtime.streams.stepper import LoopStepper, Stepper
from stepcell.runtime.streams.stream import Stream
from stepcell.runtime.streams.undeclared import Input, Output

__all__ = ["run_streams"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def run_streams(
    model: str | Path | StepLoop | Stepper,
    inputs: Input | Sequence[Input],
    outputs: Output | Sequence[Output] = None,
    *,
    device: str = "cpu",
    allow_fallback: bool = False,
    keep_float16: bool = False,
    threads: int | None = None,
    backend: str = "auto",
    check_file: bool = True,
    size: tuple[int, int] | None = None,
    pixels: Declaration | None = None,
    event_window: str | None = None,
    on_bad_event: OnBadEvent = "stop",
    event_stream: str | None = None,
    fps: float | Fraction | None = None,
    limit: int | None = None,
    reset_every: int | None = None,
    reset_gap: float | None = None,
    reset_on_cut: bool = False,
    on_nonfinite: OnNonFinite = "stop",
    on_size_change: OnSizeChange = "stop",
    resize: str | None = None,
    timestamps: Timestamps | None = None,
    audio: Audio | None = None,
    deadline_ms: float | None = None,
    on_late: OnLate = "drop",
    reconnect: float = 0.0,
    snapshot: str | Path | None = None,
    snapshot_every: int | None = None,
    resume: bool = False,
    metrics: Metrics | int | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[RunProgress], None] | None = None,
    control: RunControl | None = None,
) -> RunReport:
    """Step every frame of the inputs through a model and write the results; options as of `stepcell run`.

    Several inputs share one batched step, each with its own states. However a stream ends, its output is finished
    as a valid file and the other streams go on; if no frame was stepped, an older file of the output stays.

    Args:
        model: path of a model, which is opened with `device`, `allow_fallback`, `keep_float16`, `threads`,
            `backend` and `check_file` of `StepLoop.open`; or an open loop, with a slot for each of several inputs,
            without slots for one; or a stepper, which is not closed.
        inputs: one input or several: a path, URL or `camera:N` as of `--input`, or a `Source`. The clips of a folder
            or a pattern such as "clips/*.mp4" run one after another, each from the initial states.
        outputs: None (frames are only stepped), or one output for each input: a path as of `--output`, a `Sink`
            or None; for clips a folder, or a pattern such as "out/*.mkv".
        device: see `model`.
        allow_fallback: see `model`.
        keep_float16: see `model`.
        threads: see `model`.
        backend: see `model`.
        check_file: see `model`.
        size: (width, height) in pixels of raw frames on stdin, or of an event sensor.
        pixels: what the values of pictures are, in place of what the contract says, as --range, --mean, --std,
            --channels and --layout declare it: a `Pixels` for every picture, or by name of an input or output.
        event_window: events of one step, such as "30ms"; by default that of the contract.
        on_bad_event: "stop" the stream before an event outside the sensor or earlier than the one before, "drop" such
            events, or "clamp" them onto the sensor and to the time before; all are counted.
        event_stream: which of several streams of events of a file: a topic of a rosbag, a number of AEDAT4, a group of
            HDF5.
        fps: frames per second of the outputs, 0.001 to 1000; by default those of the input, else 25.
        limit: end each stream after this many frames.
        reset_every: reset the states before every frame whose number is a multiple of this.
        reset_gap: reset the states if two frames are more than this many seconds apart.
        reset_on_cut: reset the states at a scene cut.
        on_nonfinite: on NaN or Inf in a frame, an output or a state, "stop" the stream, "reset" its states and go on,
            or "ignore" it.
        on_size_change: at a frame of another size, "stop" the stream, or "reset" its states and go on.
        resize: bring all frames to one size: "640x360", "640x360,fit" in proportion with black bars, "stretch" or
            "fit" to the size of the model, if it is fixed. Outputs are not scaled back.
        timestamps: of a video: "keep" those of the input, or frames at a "constant" rate; by default those of cameras
            and URLs are kept.
        audio: "copy" the sound of a file into the video, whose timestamps are those of the input then.
        deadline_ms: milliseconds from decoding to stepping after which a frame of a live source is late.
        on_late: "drop" late frames, or "block" the source instead; late frames are counted.
        reconnect: reopen a lost camera or URL for this many seconds after its last frame; 0: not at all.
        snapshot: .safetensors file to which the states are written periodically and at the end.
        snapshot_every: frames, or steps of several inputs, between snapshots; by default 250.
        resume: continue from `snapshot`, if the file exists, at the next frame.
        metrics: port of a Prometheus endpoint on this machine, or a `Metrics` server, which stays open.
        report: file to which the report is written as JSON, also if streams failed.
        overwrite: replace existing files that no run wrote; inputs, and what belongs to them, never.
        progress: called in this thread at the start, after every step, at least ten times a second, and at the end.
        control: stops the run or resets states from another thread.

    Returns:
        The report, with one entry per input.

    Raises:
        UsageError: options that contradict each other or are out of range, an output that is an input or a foreign
            file, or pictures of which neither the contract nor `pixels` says what their values are.
        RunError: a stream failed, or the report could not be written; `report` of the error has the report, and
            its exit code is that of the cause.
        InputError: an input cannot be opened, or the model takes neither pictures nor events.
        OutputError: an output cannot be created, or the port not be listened on.
        StateError: the snapshot is of another model or another number of inputs.
        StepcellError: the model cannot be opened, as listed at `StepLoop.open`.
        KeyboardInterrupt: after the outputs are closed, unless `control` was asked to stop before.
    """
    inputs, outputs = _as_list(inputs), [] if outputs is None else _as_list(outputs)
    clips = _clips(inputs, outputs)
    if clips is not None:
        inputs, outputs = clips
        if snapshot is not None:
            raise UsageError("--snapshot: of one stream, or of several at once, not of clips one after another")
    _check_options(
        ("limit", limit, limit is None or limit >= 1, "1 or more"),
        ("reset_every", reset_every, reset_every is None or reset_every >= 1, "1 or more"),
        ("snapshot_every", snapshot_every, snapshot_every is None or snapshot_every >= 1, "1 or more"),
        ("reset_gap", reset_gap, reset_gap is None or reset_gap > 0, "a number above zero"),
        ("deadline_ms", deadline_ms, deadline_ms is None or deadline_ms > 0, "a number above zero"),
        ("reconnect", reconnect, reconnect >= 0, "a number of seconds"),
        ("fps", fps, fps is None or FRAME_RATES[0] <= fps <= FRAME_RATES[1], "0.001 to 1000 frames per second"),
        ("on_late", on_late, on_late in get_args(OnLate), "drop or block"),
        ("on_nonfinite", on_nonfinite, on_nonfinite in get_args(OnNonFinite), "stop, reset or ignore"),
        ("on_size_change", on_size_change, on_size_change in get_args(OnSizeChange), "stop or reset"),
        ("on_bad_event", on_bad_event, on_bad_event in get_args(OnBadEvent), "stop, drop or clamp"),
        ("timestamps", timestamps, timestamps in (None, *get_args(Timestamps)), "keep or constant"),
        ("audio", audio, audio in (None, *get_args(Audio)), "copy"),
    )
    if fps is not None and (timestamps == "keep" or audio is not None):
        option = "--timestamps keep" if timestamps == "keep" else "--audio copy"
        raise UsageError(f"--fps and {option}: the timestamps of the input have their own rate", hint="omit --fps")
    if timestamps == "constant" and audio is not None:
        raise UsageError("--audio copy: keeps the timestamps of the input", hint="omit --timestamps constant")
    if snapshot is None and (resume or snapshot_every is not None):
        raise UsageError("--resume and --snapshot-every need --snapshot FILE")
    is_path = isinstance(model, (str, Path))
    of_a_path = (device, allow_fallback, keep_float16, threads, backend, check_file)
    if not is_path and of_a_path != ("cpu", False, False, None, "auto", True):
        options_of_a_path = "device, allow_fallback, keep_float16, threads, backend, check_file"
        raise UsageError(f"{options_of_a_path}: expected with the path of a model, got a loop")
    if snapshot is not None and not (is_path or isinstance(model, StepLoop)):
        raise UsageError("--snapshot: is of states on this machine")
    snapshot_path = None if snapshot is None else Path(snapshot)
    files: dict[str, tuple[Path | None, Callable[[Path], bool]]] = {
        "--report": (None if report is None else Path(report), is_report),
        "--snapshot": (snapshot_path, is_snapshot),
    }
    name = str(model) if isinstance(model, (str, Path)) else model.name
    check_names(name, inputs, outputs, files, overwrite=overwrite)
    options = StreamOptions(
        size=size,
        fps=None if fps is None else Fraction(fps),
        reset=ResetPolicy(reset_every, reset_gap, reset_on_cut, on_nonfinite, on_size_change),
        deadline=None if deadline_ms is None else Deadline(deadline_ms / 1e3, on_late),
        reconnect=reconnect,
        limit=limit,
        resize=resize,
        timestamps=timestamps,
        audio=audio,
        on_bad_event=on_bad_event,
        event_stream=event_stream,
    )
    names = stream_names(inputs)
    control = control or RunControl()
    with contextlib.ExitStack() as stack:
        loop: StepLoop | None = None
        stepper: Stepper
        if isinstance(model, (str, Path, StepLoop)):
            slots = len(inputs) if len(inputs) > 1 and clips is None else None
            loop = (
                model
                if isinstance(model, StepLoop)
                else stack.enter_context(
                    StepLoop.open(
                        model,
                        device,
                        slots=slots,
                        allow_fallback=allow_fallback,
                        keep_float16=keep_float16,
                        threads=threads,
                        spin="in step",  # between two steps the other threads of a stream need the cores
                        backend=backend,
                        check_file=check_file,
                    )
                )
            )
            stepper = LoopStepper(loop)
        else:
            stepper = model
        logger.info(f"{stepper.name}: {stepper.description}")
        contract = declare(stepper.contract, pixels)
        for change in changes(stepper.contract, contract):
            logger.info(f"{stepper.name}: {change} (for this run)")
        spec = image_input(contract, len(inputs) if clips is None else 1)
        starts = {}
        if loop is not None and resume and snapshot_path:
            starts = resume_streams(loop, snapshot_path, names)
        snapshots = None
        if snapshot_path is not None:
            snapshots = SnapshotWriter(
                snapshot_path, snapshot_every or SNAPSHOT_EVERY, ", ".join(names), overwrite=overwrite
            )
        if isinstance(metrics, int):
            metrics = stack.enter_context(Metrics(metrics))
        events = event_input(spec, event_window)
        if events is not None and reset_on_cut:
            raise UsageError("--reset-on-cut: events have no scene cuts", hint="--reset-gap SECONDS resets after one")
        streams: list[Stream] = []
        reports: list[StreamReport] = []
        together = [(inputs, outputs)] if clips is None else [([i], [o]) for i, o in zip(inputs, outputs, strict=True)]
        for some, their_outputs in together:
            if control.stopping and reports:
                logger.warning(f"{len(inputs) - len(reports)} clips were not run")
                break
            opened = open_streams(
                some, their_outputs, options, model=stepper.name, contract=contract, events=events, starts=starts,
                control=control, isolated=clips is not None, gives_pixels=stepper.gives_pixels,
            )  # fmt: skip
            if not streams:
                _note_unused(options, some, opened)
            streams += opened
            if metrics is not None:
                metrics.watch(streams)
            scheduler = Scheduler(
                stepper, opened, contract=contract, snapshots=snapshots, control=control, times=metrics,
                progress=_of_all(progress, streams),
            )  # fmt: skip
            reports += scheduler.run()
        result = RunReport(model=display_name(stepper.name), streams=reports)
    failures = {stream.name: stream.failure for stream in streams if stream.failure is not None}
    error = RunError.of_streams(failures, result) if failures else None
    if report is not None:
        try:
            write_atomic(Path(report), result.to_json())
        except OutputError as unwritten:
            if error is not None:  # the failure of a stream is the error to raise
                logger.warning(unwritten.message)
            error = error or RunError(unwritten, result)
    if error is not None:
        raise error from next(iter(failures.values()), None)
    return result


def _note_unused(options: StreamOptions, inputs: Sequence[Input], streams: Sequence[Stream]) -> None:
    """Say which options have no effect, since no input is a camera."""
    if options.reconnect and not any(isinstance(each, str) and is_remote(each) for each in inputs):
        logger.info("--reconnect: has no effect: no input is a camera or URL")
    if options.deadline is not None and not any(stream.live for stream in streams):
        logger.info("--deadline-ms: has no effect: frames of files are never late")


def _clips(inputs: list[Input], outputs: list[Output]) -> tuple[list[Input], list[Output]] | None:
    """Clips of a folder or pattern, and the output of each; None: the inputs are streams as they are."""
    found = {str(each): find_clips(str(each)) for each in inputs if isinstance(each, (str, Path))}
    text = next((text for text, clips in found.items() if clips is not None), None)
    if text is None:
        return None
    clips = found[text] or []
    if len(inputs) > 1:
        raise UsageError(
            f"--input {text}: {len(clips)} clips, which run one after another",
            hint="give it alone, or name each clip with an --input of its own: they run together then",
        )
    if len(outputs) > 1:
        raise UsageError(f"--output: {len(outputs)} for one folder of clips", hint="give one folder")
    output = outputs[0] if outputs else None
    if output is None:
        return list(clips), [None] * len(clips)
    if not isinstance(output, (str, Path)):
        raise UsageError(f"--input {text}: {len(clips)} clips cannot share one sink", hint="name a folder")
    return list(clips), list(clip_outputs(text, clips, str(output)))


def _of_all(
    progress: Callable[[RunProgress], None] | None, streams: Sequence[Stream]
) -> Callable[[RunProgress], None] | None:
    """The callback with the streams of earlier clips too."""
    shown = tuple(streams)
    return progress and (lambda now: progress(RunProgress(shown, now.step)))


def _as_list(values: _T | Sequence[_T]) -> list[_T]:
    return list(values) if isinstance(values, (list, tuple)) else [cast(_T, values)]


def _check_options(*checks: tuple[str, object, bool, str]) -> None:
    """Raise UsageError for the first check (name, value, whether it is valid, what is expected) that fails."""
    for name, value, valid, expected in checks:
        if not valid:
            raise UsageError(f"{name}: expected {expected}, got {value!r}")
