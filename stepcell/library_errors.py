"""The one place where errors of libraries (onnx, ONNX Runtime, numpy, torch, msgspec, FFmpeg) become stepcell's.

Libraries raise anything: ONNX Runtime has a class per failure and no common base, onnx raises bare RuntimeErrors, every
one of them MemoryError, and all of them RecursionError for data that is nested deeply enough.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from stepcell.errors import DeviceError, StepcellError

__all__ = ["as_stepcell_error", "first_line", "is_out_of_memory", "library_errors"]

# As numpy, torch, ONNX Runtime, C++, protobuf, FFmpeg and CUDA say it.
_MEMORY = re.compile(
    r"bad[_ ]alloc|(?:fail\w*|unable|can(?:no|')t|not able|could not) (?:to )?allocate|out of memory|not enough memory|"
    r"cannot allocate memory|alloc_cpu|memory allocation failed|std::length_error",
    re.IGNORECASE,
)


_SOURCE_LINE = re.compile(r" \[[\w.:]+:\d+ at .*\]$")  # as Boost appends it: [system:111 at /src/socket.hpp:588 in ...]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory ran out."""
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, without the line of a C++ source; else its class.

    Of an error of the system, what happened, without its number and the path, which is the subject.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = (line.strip() for line in str(error).splitlines())
    return _SOURCE_LINE.sub("", next((line for line in lines if line), type(error).__name__))[:1000]


def as_stepcell_error(
    error: BaseException,
    subject: str,
    kind: type[StepcellError] = StepcellError,
    *,
    what: str = "",
    hint: str | None = None,
) -> StepcellError:
    """The error to raise in the place of one of a library.

    Args:
        subject: file, model or device that it is about.
        kind: class of the result, unless memory ran out: that is a DeviceError.
        what: what did not succeed, such as "cannot be read".
        hint: as of `StepcellError`.

    Returns:
        `error` itself if it is one of stepcell's.
    """
    if isinstance(error, StepcellError):
        return error
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    if is_out_of_memory(error):
        asked = "" if reason == "MemoryError" else f": {reason}"
        return DeviceError(
            f"{subject}: not enough memory{asked}", hint="use smaller frames, fewer streams or a smaller model"
        )
    return kind(f"{subject}: {what} ({reason})" if what else f"{subject}: {reason}", hint=hint)


@contextlib.contextmanager
def library_errors(
    subject: str, kind: type[StepcellError] = StepcellError, *, what: str = "", hint: str | None = None
) -> Iterator[None]:
    """Raise every error of the block as one of stepcell's; arguments are those of `as_stepcell_error`."""
    try:
        yield
    except StepcellError:
        raise
    except Exception as error:
        raise as_stepcell_error(error, subject, kind, what=what, hint=hint) from error
