"""What a request of one frame holds, and the named errors that answer a frame that is not stepped.

A stream is known by a random id, `CORRID`, which its first request draws. Its frames are numbered from 0. `CLIENT` is a
second random number, the same in every frame of a stream: two clients that happen to use one id have different ones.
`START` on frame 0 begins a stream, and is the only reset; on a later frame it says that this frame may reach another
server, or another process of it, than the one before. `END` frees the slot once its frame is answered.

A request with the number `CHECK` belongs to no stream: it is answered if a frame can be stepped. Its inputs have the
values of `check_values`, because a Python back end that was built for numpy 1, in a Python with numpy 2, hands over the
first of them, repeated, without an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import StepcellError

__all__ = [
    "CHECK",
    "CLIENT",
    "ID",
    "NUMBER",
    "RESERVED",
    "STEPPED",
    "FrameRequest",
    "NotAnswered",
    "Refusal",
    "RefusedFrame",
    "check_values",
]

NUMBER, CLIENT, ID = "FRAME", "CLIENT", "CORRID"  # inputs of a request: int64, int64, uint64
CHECK = -1  # number of the frame of a health check
STEPPED = "STEPPED"  # output: the number of the frame that is answered, int64
RESERVED = (NUMBER, CLIENT, ID, STEPPED, "START", "END")

Refusal = Literal[
    "OUT_OF_STEP",  # the stream is at another frame, which is named; or its id is in use
    "RESUMED_AT",  # the state was lost, and is again that before the named frame, by a snapshot
    "NO_SNAPSHOT",  # the state was lost, and there is no snapshot from which it can be continued
    "STATE_LOST",  # the state was lost, and this server writes no snapshots, or they cannot be read
    "FULL",  # all slots are in use, by streams that are not idle
    "BAD_FRAME",  # the frame cannot be stepped; the state is that before it
    "NOT_FINITE",  # the frame was stepped, and its output holds NaN or Inf, which pixels cannot show
    "FAILED",  # the device failed; the state is that before the frame
]
_TEXT = re.compile(rf"\b({'|'.join(get_args(Refusal))})(?: (\d+))?: (.*)", re.DOTALL)


def check_values(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """An input of a check: 1, 2, 3, ..."""
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


class RefusedFrame(StepcellError):
    """A frame that was not answered, and why.

    Args:
        name: the reason.
        reason: the same in words.
        frame: the frame that is to be sent next, where there is one.
    """

    def __init__(self, name: Refusal, reason: str, frame: int | None = None) -> None:
        self.name: Refusal = name
        self.frame: int | None = frame
        self.reason: str = reason
        super().__init__(f"{name}{'' if frame is None else f' {frame}'}: {reason}")

    @classmethod
    def parse(cls, text: str) -> RefusedFrame | None:
        """From the message of an answer; None: it is none of these errors."""
        found = _TEXT.search(text)
        if found is None:
            return None
        name, frame, reason = found.groups()
        return cls(name, reason, None if frame is None else int(frame))  # type: ignore[arg-type]  # of the pattern


class NotAnswered(StepcellError):
    """A request without an answer: no connection, no answer in time, or a server whose model process is gone."""


@dataclass(frozen=True)
class FrameRequest:
    """A frame of a stream.

    Attributes:
        stream: id of the stream, not 0.
        client: random number of the stream, in addition to its id.
        number: number of the frame, from 0.
        arrays: the frame: inputs by name, as they come from the client.
        start, end: as in the module's docstring.
    """

    stream: int
    client: int
    number: int
    arrays: Mapping[str, NDArray[Any]]
    start: bool = False
    end: bool = False
