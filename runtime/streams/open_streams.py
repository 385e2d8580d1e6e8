"""Opens the inputs and outputs of a run, and pairs them as streams."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from stepcell.contract import StepContract, TensorSpec
from stepcell.errors import InputError, OutputError, UsageError
from stepcell.event_spec import EventSpec
from stepcell.nv12 import nv12_of
from stepcell.overwrite import check_folder, check_output, is_marked
from stepcell.pixels import is_frame_of_bytes, picture_channels
from stepcell.runtime.media.events.bad_events import OnBadEvent
from stepcell.runtime.media.open_sink import STDOUT, open_sink
from stepcell.runtime.media.open_source import STDIN, is_remote, open_source
from stepcell.runtime.media.postprocess import choose_output
from stepcell.runtime.media.raw_frames import RawSource
from stepcell.runtime.media.resize import Resize, ResizedSource
from stepcell.runtime.media.sink import Sink, TimedSink
from stepcell.runtime.media.source import Source, display_name
from stepcell.runtime.streams.deadline import Deadline
from stepcell.runtime.streams.output_clock import OutputClock, Timestamps
from stepcell.runtime.streams.reconnect import Reconnect
from stepcell.runtime.streams.reset_policy import ResetPolicy
from stepcell.runtime.streams.run_control import RunControl
from stepcell.runtime.streams.scheduler import POLL_SECONDS
from stepcell.runtime.streams.stream import Stream
from stepcell.runtime.streams.undeclared import Input, Output, Undeclared

__all__ = ["Audio", "StreamOptions", "check_names", "open_streams", "stream_names"]

logger = logging.getLogger(__name__)

Audio = Literal["copy"]
DEFAULT_FPS = Fraction(25)  # of an output whose input has no frame rate


@dataclass(frozen=True)
class StreamOptions:
    """Options that every stream of a run shares.

    Attributes:
        reset: when to reset the states.
        size: (width, height) in pixels of raw frames or of an event sensor.
        fps: frames per second of the outputs; None: those of the input.
        deadline: deadline of the frames of live sources.
        reconnect: seconds for which a lost camera or URL is reopened; 0: not at all.
        limit: frames after which a stream ends.
        resize: size to which frames are brought, as of `--resize`; None: they stay as they are.
        timestamps: whether a video has those of its input; None: for cameras and URLs, unless `fps` is given.
        audio: "copy" copies the sound of a file into the video.
        on_bad_event: what to do with bad events, as of `BadEvents`.
        event_stream: which of several streams of events of a file.
    """

    reset: ResetPolicy
    size: tuple[int, int] | None = None
    fps: Fraction | None = None
    deadline: Deadline | None = None
    reconnect: float = 0.0
    limit: int | None = None
    resize: str | None = None
    timestamps: Timestamps | None = None
    audio: Audio | None = None
    on_bad_event: OnBadEvent = "stop"
    event_stream: str | None = None

    def keeps_timestamps(self, source: Source | None) -> bool:
        """Whether a video of this source has its timestamps."""
        if self.timestamps is None and self.audio is None:
            live = source is None or (source.live and not isinstance(source, RawSource))
            return live and self.fps is None
        return self.timestamps == "keep" or self.audio is not None


def stream_names(inputs: Sequence[Input]) -> list[str]:
    """A unique name for each stream: that of its input, with a number if it repeats: a.mp4, a.mp4#2."""
    names: list[str] = []
    for each in inputs:
        text = display_name(str(each) if isinstance(each, (str, Path)) else each.name)
        name, count = text, 1
        while name in names:
            count += 1
            name = f"{text}#{count}"
        names.append(name)
    return names


def check_names(
    model: str | None,
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    files: Mapping[str, tuple[Path | None, Callable[[Path], bool]]],
    *,
    overwrite: bool = False,
) -> None:
    """Check that no file is read and written, or written twice, and that one stream at most uses stdin or stdout.

    Args:
        model: path of the model, if it is a file.
        inputs, outputs: of the streams; objects are not checked.
        files: further files to write, by the option that names them, with recognisers of what may be replaced.
        overwrite: replace existing files of other kinds, which are no inputs.

    Raises:
        UsageError: a name is used twice, a file of another kind would be replaced, or the number of outputs differs
            from that of the inputs.
        OutputError: the folder of one of `files` does not exist or cannot be written.
    """
    if outputs and len(outputs) != len(inputs):
        raise UsageError(
            f"--output: {len(outputs)} for {len(inputs)} inputs", hint="give one for each --input, in the same order"
        )
    reads = [str(each) for each in inputs if isinstance(each, (str, Path))]
    writes = [str(each) for each in outputs if isinstance(each, (str, Path))]
    for option, names in (("--input", reads), ("--output", writes)):
        if names.count(STDIN) > 1:
            raise UsageError(f"{option} -: given {names.count(STDIN)} times, and one stream can use it")
    taken: dict[str | Path, str] = {
        **({} if model is None else {model: "the model"}),
        **dict.fromkeys(reads, "--input"),
    }
    written: list[tuple[str, Path, Callable[[Path], bool]]]
    written = [("--output", Path(name), is_marked) for name in writes if name != STDOUT]
    written += [(option, path, ours) for option, (path, ours) in files.items() if path is not None]
    for option, path, ours in written:
        check_output(path, ours, reads=taken, option=option, overwrite=overwrite)
        taken[path] = option
        if option in files:  # which are written after the run
            check_folder(path, option=option)


def open_streams(
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    options: StreamOptions,
    *,
    model: str,
    contract: StepContract,
    events: EventSpec | None,
    starts: Mapping[str, int],
    control: RunControl,
    isolated: bool = False,
    gives_pixels: bool = False,
) -> list[Stream]:
    """Open all inputs and outputs, or none.

    Args:
        inputs: inputs of the streams.
        outputs: none, or one for each input; None: the frames are only stepped.
        options: the same for every stream.
        model: its name, for messages.
        contract: its contract, with what the user declared of its pictures.
        events: encoding of its events; None: it takes pictures.
        starts: frames that were stepped before, by the name of the stream.
        control: after a request to stop, cameras and URLs that do not answer are not waited for.
        isolated: an input that cannot be opened fails as a stream, instead of the whole call.
        gives_pixels: outputs that are pictures come as pixels, so that their tensors cannot be written.

    Raises:
        InputError: an input cannot be opened, and is not a camera or URL that may be reopened.
        OutputError: an output cannot be created.
        UsageError: an output of an unknown kind, a size for an input that takes none, tensors where pixels come, or
            pixels for or from values whose range is undefined.
        MissingDependencyError: PyAV is not installed.
    """
    spec = contract.inputs[0]
    with contextlib.ExitStack() as opened:
        sources = _open_sources(inputs, options, spec, events, control, opened, isolated=isolated)
        undeclared = Undeclared(model, inputs, outputs)
        if events is None and any(source is None or getattr(source, "pixels", None) for source in sources):
            undeclared.refuse_input(contract)
        sinks: list[Sink | None] = []
        clocks = []
        for each, source, output in zip(inputs, sources, outputs or [None] * len(inputs), strict=True):
            if isolated and isinstance(output, (str, Path)):
                _make_folder(Path(output).parent)
            fps = options.fps or (source.fps if source else None) or DEFAULT_FPS
            sink = _open_output(output, each, source, fps, options)
            if sink is not None:
                opened.callback(sink.abandon)
                undeclared.refuse_output(contract, sink)
                if gives_pixels and not sink.takes_pixels and is_frame_of_bytes(choose_output(contract, sink)):
                    raise UsageError(
                        f"--output {sink.name}: is for tensors, and this server answers with pixels",
                        hint="write a video, a folder or -; or set it up with stepcell triton-repo --frames tensors",
                    )
            sinks.append(sink)
            keep = isinstance(sink, TimedSink) and options.keeps_timestamps(source)
            name = source.name if source else str(each)
            announce = isinstance(sink, TimedSink) and options.timestamps is None and options.fps is None
            clocks.append(OutputClock(fps, keep=keep, name=display_name(name), announce=announce))
        opened.pop_all()
    streams = []
    for each, name, source, sink, clock in zip(inputs, stream_names(inputs), sources, sinks, clocks, strict=True):
        reconnect = None
        if _may_reconnect(each, options):
            reopen = functools.partial(_open_source, each, len(inputs) == 1, options, spec, events)
            reconnect = Reconnect(reopen, options.reconnect)
        streams.append(
            Stream(
                source,
                sink,
                name=name,
                reset=options.reset,
                start=starts.get(name, 0),
                limit=options.limit,
                deadline=options.deadline,
                reconnect=reconnect,
                clock=clock,
            )
        )
    return streams


class _Unreadable(Source):
    """An input that could not be opened."""

    def __init__(self, name: str, error: InputError) -> None:
        self.name, self._error = name, error

    def __iter__(self) -> Iterator[NDArray[Any]]:
        raise self._error


def _may_reconnect(each: Input, options: StreamOptions) -> bool:
    return options.reconnect > 0 and isinstance(each, str) and is_remote(each)


def _open_sources(
    inputs: Sequence[Input],
    options: StreamOptions,
    spec: TensorSpec,
    events: EventSpec | None,
    control: RunControl,
    opened: contextlib.ExitStack,
    *,
    isolated: bool,
) -> list[Source | None]:
    """Open cameras and URLs in parallel, because each may take ten seconds to fail."""
    found: dict[int, Source | BaseException | None] = {}

    def attempt(number: int) -> None:
        try:
            found[number] = _open_source(inputs[number], len(inputs) == 1, options, spec, events)
        except BaseException as error:  # raised below, in the calling thread
            if isinstance(error, InputError) and _may_reconnect(inputs[number], options):
                logger.warning(f"{error.message}: reconnecting")
            elif isinstance(error, InputError) and isolated:
                found[number] = _Unreadable(str(inputs[number]), error)
            else:
                found[number] = error

    threads = []
    for number, each in enumerate(inputs):
        if isinstance(each, str) and is_remote(each):
            threads.append(threading.Thread(target=attempt, args=(number,), daemon=True))
            threads[-1].start()
        else:
            attempt(number)
    for thread in threads:
        while thread.is_alive() and not control.stopping:
            thread.join(POLL_SECONDS)
    results = [found.get(number) for number in range(len(inputs))]
    sources = [None if isinstance(result, BaseException) else result for result in results]
    for source in sources:
        if source is not None:
            opened.callback(source.close)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return sources


def _open_source(
    each: Input, alone: bool, options: StreamOptions, spec: TensorSpec, events: EventSpec | None
) -> Source:
    if isinstance(each, (str, Path)):
        text = str(each)
        size = options.size if alone or text == STDIN or events is not None else None
        source = open_source(
            text, channels=picture_channels(spec) or 3, nv12=nv12_of(spec), size=size, events=events,
            on_bad_event=options.on_bad_event, event_stream=options.event_stream,
        )  # fmt: skip
    else:
        source = each
    return source if options.resize is None else ResizedSource(source, Resize.parse(options.resize, spec))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {folder}: cannot be created ({error.strerror})") from error


def _open_output(
    output: Output, each: Input, source: Source | None, fps: Fraction, options: StreamOptions
) -> Sink | None:
    """Open an output; says that the sound of its input is not copied."""
    if not isinstance(output, (str, Path)):
        return output
    if isinstance(source, _Unreadable):
        return None
    keep = options.keeps_timestamps(source)
    audio = None
    if options.audio is not None:
        if not isinstance(each, (str, Path)) or source is None or source.live or str(each) == STDIN:
            raise UsageError(f"--audio copy: {display_name(str(each))} is no file", hint="omit --audio copy")
        audio = Path(each)
    sink = open_sink(str(output), fps, like=source, varying=keep or source is None or source.live, audio=audio)
    if audio is None and source is not None and source.has_sound and isinstance(sink, TimedSink):
        how = "that of files can be copied" if source.live else "--audio copy copies it"
        logger.info(f"{display_name(source.name)}: its sound is not written; {how}")
    return sink
