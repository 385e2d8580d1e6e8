"""The streams that `stepcell run` was asked for: inputs and outputs, paired and opened."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from stepcell.cli.console import log
from stepcell.contract import TensorSpec
from stepcell.errors import InputError, OutputError, UsageError
from stepcell.event_spec import EventSpec
from stepcell.runtime.media.sinks import Sink, open_sink
from stepcell.runtime.media.sources import STDIN, Source, is_remote, open_source, shown
from stepcell.runtime.streams.frame_reader import Reconnect
from stepcell.runtime.streams.reset_policy import ResetPolicy, ResetWatch
from stepcell.runtime.streams.scheduler import NOTICE
from stepcell.runtime.streams.shutdown import StopRequest
from stepcell.runtime.streams.stream import Deadline, Lane

__all__ = ["Streams", "check_names", "unique"]

DEFAULT_FPS = Fraction(25)  # of an output whose input has no rate of its own


@dataclass(frozen=True)
class Streams:
    """What was asked for, the same for every stream but for its names.

    Attributes:
        inputs, outputs: as the user wrote them; no output at all, or one for each input.
        size: width and height of raw frames or of an event sensor.
        patience: seconds for which a lost camera or URL is opened again; 0: not at all.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    size: tuple[int, int] | None
    fps: Fraction | None
    policy: ResetPolicy
    deadline: Deadline | None
    patience: float
    limit: int | None

    @property
    def names(self) -> list[str]:
        """Of the streams, each one once."""
        return unique([shown(text) for text in self.inputs])

    def open(
        self, spec: TensorSpec, events: EventSpec | None, starts: Mapping[str, int], stop: StopRequest
    ) -> list[Lane]:
        """Open all of them, or none.

        Args:
            spec: the model's input; `events`: how it is made of events.
            starts: frames that were stepped before, by the stream's name.
            stop: where it comes meanwhile, cameras and URLs that do not answer are not waited for.

        Raises:
            InputError: an input cannot be opened, and is no camera or URL that is waited for.
            OutputError: an output cannot be written.
            UsageError: a name of another kind, or a size that nothing takes.
        """
        with contextlib.ExitStack() as opened:
            sources = self._sources(spec, events, stop, opened)
            sinks: list[Sink | None] = [None] * len(sources)
            for number, text in enumerate(self.outputs):
                source = sources[number]
                sink = open_sink(text, self.fps or (source.fps if source else None) or DEFAULT_FPS)
                opened.callback(sink.abandon)
                sinks[number] = sink
            opened.pop_all()
        lanes = []
        for text, name, found, target in zip(self.inputs, self.names, sources, sinks, strict=True):
            reconnect = None
            if self.patience and is_remote(text):
                reconnect = Reconnect(functools.partial(open_source, text), self.patience)
            lanes.append(
                Lane(
                    found,
                    target,
                    name=name,
                    resets=ResetWatch(self.policy),
                    start=starts.get(name, 0),
                    limit=self.limit,
                    deadline=self.deadline,
                    reconnect=reconnect,
                )
            )
        return lanes

    def _sources(
        self, spec: TensorSpec, events: EventSpec | None, stop: StopRequest, opened: contextlib.ExitStack
    ) -> list[Source | None]:
        """Cameras and URLs side by side: each may take ten seconds to give no answer."""
        found: dict[int, Source | BaseException | None] = {}

        def attempt(number: int) -> None:
            try:
                found[number] = self._source(self.inputs[number], spec, events)
            except BaseException as error:  # raised below, in the thread that asked
                found[number] = error

        threads = []
        for number, text in enumerate(self.inputs):
            if is_remote(text):
                threads.append(threading.Thread(target=attempt, args=(number,), daemon=True))
                threads[-1].start()
            else:
                attempt(number)
        for thread in threads:
            while thread.is_alive() and stop.signal is None:
                thread.join(NOTICE)
        results = [found.get(number) for number in range(len(self.inputs))]
        sources = [None if isinstance(result, BaseException) else result for result in results]
        for source in sources:
            if source is not None:
                opened.callback(source.close)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sources

    def _source(self, text: str, spec: TensorSpec, events: EventSpec | None) -> Source | None:
        takes_size = len(self.inputs) == 1 or text == STDIN or events is not None
        try:
            return open_source(text, channels=int(spec.shape[1]), size=self.size if takes_size else None, events=events)
        except InputError as error:
            if not (self.patience and is_remote(text)):
                raise
            log(f"{error.message}: trying again")
            return None


def unique(names: Sequence[str]) -> list[str]:
    """The names themselves; what comes again gets a number: a.mp4, a.mp4#2."""
    found: list[str] = []
    for name in names:
        new, count = name, 1
        while new in found:
            count += 1
            new = f"{name}#{count}"
        found.append(new)
    return found


def check_names(model: Path, inputs: Sequence[str], outputs: Sequence[str], files: Mapping[str, Path | None]) -> None:
    """Nothing may be written over something that is read, or twice; stdin and stdout serve one stream.

    Raises:
        UsageError: a name is used twice, or there are outputs for some inputs only.
        OutputError: the folder of one of `files` (by option) does not exist.
    """
    if outputs and len(outputs) != len(inputs):
        raise UsageError(
            f"--output: {len(outputs)} for {len(inputs)} inputs", hint="give one for each --input, in the same order"
        )
    for option, names in (("--input", inputs), ("--output", outputs)):
        if names.count(STDIN) > 1:
            raise UsageError(f"{option} -: given {names.count(STDIN)} times, and one stream can use it")
    taken = {str(model): "the model", **dict.fromkeys(inputs, "--input")}
    written: list[tuple[str, str | Path]] = [("--output", name) for name in outputs if name != STDIN]
    written += [(option, path) for option, path in files.items() if path is not None]
    for option, name in written:
        for other, user in taken.items():
            if os.path.realpath(name) == os.path.realpath(other):  # unlike Path.resolve good for links in a circle
                raise UsageError(f"{option} {name}: is {user} as well", hint="choose another name")
        taken[str(name)] = option
        if isinstance(name, Path) and not os.access(name.absolute().parent, os.W_OK | os.X_OK):
            raise OutputError(f"{option} {name}: its folder does not exist or cannot be written")  # not after the run
