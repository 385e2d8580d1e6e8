"""Text reader: .csv and .txt files with one event a line, also one in a .zip, as E2VID distributes them.

Which column is which is read from a line of names, if there is one. Otherwise it follows from the values: polarity is
the column of 0 and 1 (or -1 and 1), and the order is either `t x y p`, as in the data sets of E2VID and of Mueggler et
al. 2017, or `x y p t`, as metavision_file_to_csv writes it. Times with a decimal point are seconds, also those of a
file whose first ones are written as 0 or 1; others are microseconds. Polarities may be words, as a column of booleans
is written by pandas (True, False) and R (TRUE, FALSE).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import events_of, reading
from stepcell.runtime.media.events.names import columns_named
from stepcell.runtime.media.events.reader import CHUNK

__all__ = ["TextReader"]

_LOOKED_AT = 1000  # lines from which the order of the columns is found
_LONGEST = 1000  # characters of a line
_LATEST = 1 << 53  # microseconds, to which integers are exact in float64
_HEAD = 100  # lines before the first event
_PART = CHUNK // 8  # lines read at a time, whose text takes more memory than numbers
_ORDERS = ((1, 2, 3, 0), (0, 1, 2, 3))  # of x, y, p and t, without a line of names
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_BOOLEAN = re.compile(r"\b(true|false)\b", re.IGNORECASE)
_GEOMETRY = re.compile(r"%\s*geometry:\s*(\d{1,5})\s*,\s*(\d{1,5})")


class TextReader:
    """The events of a text file; columns are separated by commas, semicolons, or blanks and tabs.

    Lines that begin with # or % are skipped; `%geometry:1280,720`, and a first line of two numbers, as of E2VID,
    are the size of the sensor.

    Raises:
        InputError: no lines of four numbers, it does not show which column is which, or an archive of several files.
    """

    format = "text"

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        self._file = file
        self._text: IO[bytes] = _only_member(self.name, file) if path.suffix.lower() == ".zip" else file
        self.size: tuple[int, int] | None = None
        self._names: list[str] = []
        self._booleans = False  # written as words
        with reading(self.name):
            first = self._read_head()
            self._waiting = [first, *islice(self._lines(), _LOOKED_AT)] if first else []
        self._separator = next((each for each in ",;" if first and each in first), None)
        self._columns = len(self._split(first)) if first else 4
        self._order = self._find_order() if first else _ORDERS[0]
        self._seconds = bool(first) and self._are_seconds()
        if first and not self._names:
            self.format = f"text, read as {'x y p t' if self._order == _ORDERS[1] else 't x y p'}"

    def __iter__(self) -> Iterator[Events]:
        number, error = 0, None
        while self._waiting:
            yield from self._parse(self._waiting, number)
            number += len(self._waiting)
            if error is not None:
                raise error
            self._waiting, error = self._next_lines()
        if error is not None:
            raise error

    def close(self) -> None:
        self._text.close()
        self._file.close()

    def _lines(self) -> Iterator[str]:
        while data := self._text.readline(_LONGEST):
            text = data.decode("ascii", "replace").strip()
            if text and text[0] not in "#%":
                yield _numbered(text) if self._booleans else text

    def _next_lines(self) -> tuple[list[str], InputError | None]:
        """The next lines; fewer where an archive is damaged, and then the error."""
        found: list[str] = []
        try:
            with reading(self.name):
                found.extend(islice(self._lines(), _PART))  # keeps what came before an error
        except InputError as error:
            return found, error
        return found, None

    def _read_head(self) -> str | None:
        """Read up to the first event and return its line; None: there is no event."""
        for number in range(_HEAD):
            data = self._text.readline(_LONGEST)
            if not data:
                return None
            text = data.decode("utf-8-sig" if number == 0 else "ascii", "replace").strip()
            plain = text.replace('"', "")
            fields = [each for each in re.split(r"[,;\s]+", plain.lstrip("#% ")) if each]
            numbers = bool(fields) and all(_NUMBER.fullmatch(_numbered(each)) for each in fields)
            if match := _GEOMETRY.fullmatch(text):
                self.size = int(match[1]), int(match[2])
            elif columns_named(fields) is not None:
                self._names = ["", *fields] if plain[0] in ",;" else fields  # pandas and R do not name an index
            elif not text or text[0] in "#%":
                continue
            elif numbers and len(fields) >= 4:
                self._booleans = _BOOLEAN.search(text) is not None
                return _numbered(text)
            elif numbers and len(fields) == 2 and not _BOOLEAN.search(text) and max(map(float, fields)) < 1e5:
                self.size = int(float(fields[0])), int(float(fields[1]))
            else:
                raise InputError(
                    f"{self.name}: expected events or the names of their columns, got {text[:60]!r}",
                    hint="a first line `x,y,p,t`, in any order, says which column is which",
                )
        raise InputError(f"{self.name}: {_HEAD} lines without an event")

    def _find_order(self) -> tuple[int, int, int, int]:
        """Columns of x, y, p and t."""
        if (named := columns_named(self._names)) is not None:
            if len(self._names) != self._columns:
                raise InputError(
                    f"{self.name}: {len(self._names)} names of columns, {self._columns} in {self._waiting[0][:60]!r}",
                    hint="every column needs a name, also one that is not used, and a decimal point is no comma",
                )
            x, y, p, t = (self._names.index(each) for each in named)
            return x, y, p, t
        table = self._numbers(self._waiting)
        possible = [order for order in _ORDERS if self._columns == 4 and _fits(table, order)]
        if len(possible) != 1:
            raise InputError(
                f"{self.name}: its first {len(table)} events do not show which column is x, y, p and t",
                hint="add a first line with their names, such as `t x y p`",
            )
        return possible[0]

    def _are_seconds(self) -> bool:
        """Whether times are seconds: the first has a decimal point, or a later one a fraction (0 may be all of 0.0)."""
        t = self._numbers(self._waiting)[:, self._order[3]]
        plain = self._split(self._waiting[0])[self._order[3]].lstrip("+-").isdigit()
        return not plain or bool((t != np.floor(t)).any())

    def _numbers(self, lines: list[str]) -> NDArray[np.float64]:
        """The columns of the lines, of all or of those before the first that is not of as many numbers."""
        try:
            table = np.loadtxt(lines, delimiter=self._separator, ndmin=2, comments=None)
            if table.shape[1] == self._columns and np.isfinite(table).all():
                return table
        except ValueError:
            pass
        good = lines[: next((at for at, line in enumerate(lines) if not self._is_event(line)), 0)]
        return np.loadtxt(good, delimiter=self._separator, ndmin=2) if good else np.empty((0, self._columns))

    def _is_event(self, line: str) -> bool:
        fields = self._split(line)
        plain = line.replace("\t", " ").isprintable()
        return plain and len(fields) == self._columns and all(_NUMBER.fullmatch(each) for each in fields)

    def _split(self, line: str) -> list[str]:
        return [each.strip() for each in line.split(self._separator)]

    def _parse(self, lines: list[str], number: int) -> Iterator[Events]:
        table = self._numbers(lines)
        x, y, p, t = table[:, self._order].T
        if not self._seconds:
            known = (t == np.floor(t)) & (np.abs(t) < _LATEST)
            if not known.all():
                at = int(known.argmin())
                if at:
                    yield from self._parse(lines[:at], number)
                raise InputError(
                    f"{self.name}: event {number + at}: expected whole microseconds below 2^53, as the first time has "
                    f"no decimal point, got {lines[at][:60]!r}",
                    hint="nanoseconds are not read; where the first time has a decimal point, all are seconds",
                )
        yield from events_of(self.name, number, x, y, p, t if self._seconds else t.astype(np.int64))
        if len(table) < len(lines):
            raise InputError(
                f"{self.name}: event {number + len(table)}: expected {self._columns} numbers, "
                f"got {lines[len(table)][:60]!r}"
            )


def _numbered(text: str) -> str:
    """With 1 and 0 in place of the words true and false."""
    return _BOOLEAN.sub(lambda word: str(int(word[0].lower() == "true")), text)


def _only_member(name: str, file: BinaryIO) -> IO[bytes]:
    """The text of an archive that holds one; it is unpacked line by line."""
    with reading(name, "not a readable .zip"):
        archive = zipfile.ZipFile(file)
        texts = [each for each in archive.namelist() if each.lower().endswith((".txt", ".csv"))]
        if len(texts) != 1:
            raise InputError(f"{name}: expected one .txt or .csv in it, got {len(texts)}", hint="unpack it")
        return archive.open(texts[0])


def _fits(table: NDArray[np.float64], order: tuple[int, int, int, int]) -> bool:
    """Whether the first events make sense in this order: pixels, polarities, and times that mostly increase."""
    x, y, p, t = table[:, order].T
    pixels = ((x >= 0) & (x == np.floor(x)) & (y >= 0) & (y == np.floor(y))).all()
    return bool(pixels and np.isin(p, (-1, 0, 1)).all() and (np.diff(t) >= 0).sum() * 2 >= len(t) - 1)
