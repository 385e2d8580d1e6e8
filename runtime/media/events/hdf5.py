"""HDF5 reader: the layout of DSEC and its relatives, through h5py; hdf5plugin decompresses DSEC's own files.

Events are the datasets x, y, p and t of one group; in DSEC `events`, with the offset of t in `t_offset` (Gehrig et al.
2021, https://dsec.ifi.uzh.ch). The same columns with other names, or as the fields of one dataset such as `CD/events`
of Prophesee's files, are read too; those are compressed with Prophesee's own codec, ECF, which no package holds. MVSEC
(Zhu et al. 2018) has tables `events` of four floats: x, y, t in seconds, p.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stepcell.errors import InputError, MissingDependencyError
from stepcell.library_errors import library_errors
from stepcell.optional_imports import require
from stepcell.runtime.media.events.columns import Events
from stepcell.runtime.media.events.library_reader import choose_stream, events_of
from stepcell.runtime.media.events.names import columns_named
from stepcell.runtime.media.events.reader import CHUNK, LARGEST

__all__ = ["Hdf5Reader"]

_ECF = 0x8ECF
_BLOCK = 1 << 12  # events read at a time where a part is damaged
_BUILT_IN = 256  # filters of HDF5 itself have lower numbers


class Hdf5Reader:
    """The events of an HDF5 file. Links and data outside the file are not followed.

    Args:
        path: the file.
        file: the same file, open; h5py opens it again.
        stream: name of the group or dataset of the events; None: the only one.

    Raises:
        InputError: not an HDF5 file, without events, or compressed with ECF.
        UsageError: several groups of events, or not the one that was asked for.
        MissingDependencyError: h5py is not installed, or hdf5plugin where the file needs it.
    """

    format = "HDF5"

    def __init__(self, path: Path, file: BinaryIO, stream: str | None = None) -> None:
        file.close()
        self.name = str(path)
        self._h5py = require("h5py", extra="hdf5", purpose="reading HDF5")
        with library_errors(self.name, InputError, what="not a readable HDF5 file"):
            self._file = self._h5py.File(path, "r")
        try:
            with library_errors(self.name, InputError, what="not a readable HDF5 file"):
                found = self._find()
                chosen = choose_stream(self.name, sorted(found), stream, kind="group")
                self._columns: list[Any] = found[chosen]
                self._offset = self._number("t_offset", around=chosen) or 0
                self.size = self._size(chosen)
            for dataset in self._columns:
                self._require_readable(dataset)
            lengths = {len(column) for column in self._columns}
            if len(lengths) != 1:
                raise InputError(f"{path}: {chosen}: x, y, p and t need the same length, got {sorted(lengths)}")
        except BaseException:
            self._file.close()
            raise

    def __iter__(self) -> Iterator[Events]:
        for number in range(0, len(self._columns[0]), CHUNK):
            yield from self._part(number, CHUNK)

    def _part(self, number: int, count: int) -> Iterator[Events]:
        """Events from a number on; of a damaged part those of its whole blocks before the damage, then the error."""
        rows = slice(number, number + count)
        try:
            with library_errors(self.name, InputError, what=f"events {number} on: broken or truncated"):
                parts = [column[rows] for column in self._columns]
                x, y, p, t = parts if len(parts) == 4 else _of_table(parts[0])
        except InputError:
            if count == _BLOCK:
                raise
            for start in range(number, number + count, _BLOCK):
                yield from self._part(start, _BLOCK)
            return
        yield from events_of(self.name, number, x, y, p, self._shifted(t))

    def close(self) -> None:
        self._file.close()

    def _shifted(self, t: NDArray[Any]) -> NDArray[Any]:
        if not self._offset:
            return t
        return t + self._offset if t.dtype.kind == "f" else t.astype(np.int64) + int(self._offset)

    def _find(self) -> dict[str, list[Any]]:
        """The groups and datasets that hold events, by name; only hard links of the file are followed."""
        found: dict[str, list[Any]] = {}

        def look(name: str, item: Any) -> None:
            if isinstance(item, self._h5py.Dataset):
                floats = item.ndim == 2 and item.shape[1] == 4 and name.rpartition("/")[2] == "events"
                if floats or (item.ndim == 1 and columns_named(item.dtype.names or ()) is not None):
                    found[name] = [item]
                return
            children = [key for key in item if item.get(key, getlink=True).__class__.__name__ == "HardLink"]
            datasets = {key: item[key] for key in children}
            flat = [
                key for key, each in datasets.items() if isinstance(each, self._h5py.Dataset) and each.ndim == 1
            ]  # fmt: skip
            if (fields := columns_named(flat)) is not None:
                found[name or "/"] = [datasets[field] for field in fields]

        look("", self._file)
        self._file.visititems(look)
        return found

    def _require_readable(self, dataset: Any) -> None:
        if dataset.is_virtual or dataset.external:
            raise InputError(f"{self.name}: {dataset.name}: its values are in another file, which is not read")
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(at)[0] for at in range(plist.get_nfilters())]
        if _ECF in filters and not self._h5py.h5z.filter_avail(_ECF):
            raise InputError(
                f"{self.name}: {dataset.name}: compressed with Prophesee's codec ECF, which is not read",
                hint=f"convert it to DAT with Prophesee's tools: metavision_file_to_dat -i {self.name}",
            )
        if any(each >= _BUILT_IN for each in filters):
            try:
                require("hdf5plugin", extra="dsec", purpose=f"{self.name}: its compression")
            except MissingDependencyError:
                if not all(self._h5py.h5z.filter_avail(each) for each in filters):
                    raise

    def _number(self, name: str, *, around: str) -> Any:
        """A scalar dataset or attribute of a group, the one above it or the file; None: there is none."""
        group = self._file[around]
        for place in [group, group.parent, self._file]:
            if isinstance(place, self._h5py.Dataset):
                continue
            link = place.get(name, getlink=True)
            value = place[name] if isinstance(link, self._h5py.HardLink) else place.attrs.get(name)
            if value is not None:
                with contextlib.suppress(TypeError, ValueError):
                    return np.asarray(value[()]).reshape(-1)[0]
        return None

    def _size(self, group: str) -> tuple[int, int] | None:
        sides = [self._number(name, around=group) for name in ("width", "height")]
        if None in sides:
            resolution = self._file.attrs.get("sensor_resolution")  # (height, width): EventCNN, ESIM
            if resolution is None or np.shape(resolution) != (2,):
                return None
            sides = [resolution[1], resolution[0]]
        if not all(0 < side <= LARGEST for side in sides):
            raise InputError(f"{self.name}: width and height: expected 1 to {LARGEST} pixels, got {sides}")
        return int(sides[0]), int(sides[1])


def _of_table(table: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """x, y, p and t of a table with named fields, or of MVSEC's."""
    fields = columns_named(table.dtype.names or ())
    if fields is not None:
        x, y, p, t = (table[field] for field in fields)
    else:
        x, y, t, p = table.T
    return x, y, p, t
