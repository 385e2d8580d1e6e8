"""NumPy files: reading, also of broken ones, and writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepcell.errors import InputError
from stepcell.runtime.media.npy_file import ArraySink, ArraySource
from stepcell.runtime.media.open_source import open_source
from tests.runtime.media.frames import noise, write_all


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4, 6, 3), np.uint8), np.zeros((2, 4, 6, 1), np.uint8), np.zeros((2, 3, 4, 6), np.float16)],
    ids=["rgb", "grey", "float"],
)
def test_array(array: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", array)
    source = open_source(str(tmp_path / "clip.npy"))
    assert source.length == 2
    np.testing.assert_array_equal(list(source), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 6, 3), np.uint8),
        np.zeros((2, 4, 6, 3), np.int32),
        np.zeros((2, 4, 6, 2), np.uint8),
        np.zeros((2, 8, 6, 3), np.float32),
        np.zeros((0, 4, 6, 3), np.uint8),
        np.zeros(5, np.float32),
    ],
    ids=["rank", "dtype", "channels", "layout", "no frames", "vector"],
)
def test_refused_arrays(array: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", array)
    with pytest.raises(InputError, match=r"clip\.npy: expected"):
        ArraySource(tmp_path / "clip.npy")


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_array(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"clip\.npy: not a readable \.npy array"):
        ArraySource(tmp_path / "clip.npy")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError):
        ArraySource(tmp_path / "clip.npy")


def test_an_array_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """A mapped file would kill the process with SIGBUS."""
    path = tmp_path / "clip.npy"
    np.save(path, np.ones((100, 64, 64, 3), np.uint8))
    frames = iter(open_source(str(path)))
    assert next(frames).all()
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(InputError, match=r"truncated at frame 2[0-9] of 100"):
        list(frames)


def test_an_array_in_fortran_order(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((5, 3, 4, 6), np.float32)
    np.save(tmp_path / "clip.npy", np.asfortranarray(frames))
    np.testing.assert_array_equal(list(open_source(str(tmp_path / "clip.npy"))), frames)


def test_another_file_under_the_name_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "clip.npy"
    with path.open("wb") as file:
        np.savez(file, frames=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="not a readable"):
        open_source(str(path))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("count", [1, 12])
def test_array_is_exact(dtype: str, count: int, tmp_path: Path) -> None:
    frames = noise(count, 3, 5, 4).astype(dtype)
    write_all(ArraySink(tmp_path / "out.npy"), frames)
    again = np.load(tmp_path / "out.npy")
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, frames)


def test_an_array_that_does_not_fit_is_removed(tmp_path: Path) -> None:
    """Closing the file fails like the writes before."""
    path = tmp_path / "out.npy"
    sink = ArraySink(path)
    sink.write(np.zeros((1, 4, 4), np.float32))
    # Close the descriptor, so that every further write fails.
    os.close(sink._file.fileno())
    sink.abandon()
    assert not list(tmp_path.iterdir())
