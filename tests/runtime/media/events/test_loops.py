"""The compiled loops give bit by bit what NumPy gives, of any words and events."""

from __future__ import annotations

import logging
from types import ModuleType

import numpy as np
import pytest

from stepcell.errors import InputError
from stepcell.event_spec import EventSpec, EventWindow
from stepcell.runtime.media.events import Events, event_tensor, tensor
from stepcell.runtime.media.events.compiled import compiled_loops
from stepcell.runtime.media.events.evt2 import Evt2
from stepcell.runtime.media.events.evt3 import Evt3

pytest.importorskip("numba")
WINDOW = EventWindow(size=1, unit="events")


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    found = compiled_loops()
    assert found is not None
    return found


def random_words(kind: type[Evt2] | type[Evt3], seed: int) -> list[np.ndarray]:
    """Parts of words of every type; some of the usual ones only, some with bits that no camera sends."""
    rng = np.random.default_rng(seed)
    bits, types = (28, [0, 1, 8, 8, 10, 15]) if kind is Evt2 else (12, [0, 2, 3, 4, 5, 6, 8, 8, 1, 10])
    count = int(rng.integers(1, 3000))
    words = rng.choice(types, count).astype(np.int64) << bits | rng.integers(0, 1 << bits, count)
    if seed % 3 == 0:  # no time words at the beginning
        words[: count // 2] = words[: count // 2] & ((1 << bits) - 1) | 2 << bits
    if seed % 3 == 1:  # times that go on, with wraps
        rows = np.flatnonzero(words >> bits == 8)
        words[rows] = 8 << bits | np.cumsum(rng.integers(0, 1 << bits - 2, len(rows))) % (1 << bits)
    parts = np.split(words.astype(kind.word), np.unique(rng.integers(1, count + 1, 4)))
    return [part for part in parts if len(part)]


@pytest.mark.parametrize("kind", [Evt2, Evt3])
def test_decoders_are_equal(kind: type[Evt2] | type[Evt3], loops: ModuleType) -> None:
    total = 0
    for seed in range(60):
        one, other = kind(), kind()
        for part in random_words(kind, seed):
            got, wanted = one._decode_compiled(loops, part), other._decode(part)
            for name in "xypt":
                assert getattr(got, name).dtype == getattr(wanted, name).dtype
                assert np.array_equal(getattr(got, name), getattr(wanted, name)), (seed, name)
            assert vars(one) == vars(other)
            total += len(got)
    assert total > 10_000


def some_events(count: int, size: tuple[int, int], seed: int, span: int) -> Events:
    rng = np.random.default_rng(seed)
    t = 10**12 + np.sort(rng.integers(0, span + 1, count))
    # Few pixels, so that events of both polarities cancel.
    x, y = rng.integers(0, min(size[0], 9), count) * (size[0] - 1) // 8, rng.integers(0, size[1], count)
    return Events.of(np.minimum(x, size[0] - 1), y, rng.integers(0, 2, count), t)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("polarity", ["signed", "split"])
@pytest.mark.parametrize("representation", ["voxel_grid", "event_volume", "histogram"])
def test_tensors_are_equal(
    representation: str, polarity: str, normalise: bool, loops: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (bins, count, size, span)
        for bins in (1, 2, 5)
        for count, span in ((1, 0), (2, 1), (50, 0), (3000, 7), (40_000, 33_333))
        for size in ((130, 97), (64, 64))
    ]
    for seed, (bins, count, size, span) in enumerate(cases):
        spec = EventSpec(
            representation=representation,  # type: ignore[arg-type]
            bins=bins,
            polarity=polarity,  # type: ignore[arg-type]
            window=WINDOW,
            normalise=normalise,
        )
        events = some_events(count, size, seed, span)
        got = event_tensor(events, spec, size[1], size[0])
        with monkeypatch.context() as patch:
            patch.setattr(tensor, "compiled_loops", lambda: None)
            wanted = event_tensor(events, spec, size[1], size[0])
        assert got.shape == wanted.shape
        assert np.array_equal(got.view(np.int32), wanted.view(np.int32)), (bins, count, size, span)


@pytest.mark.parametrize("x", [[-1], [130]])
def test_no_pixel_outside_the_tensor_is_written(x: list[int]) -> None:
    spec = EventSpec(representation="voxel_grid", bins=2, window=WINDOW)
    events = Events(np.array(x), np.array([1]), np.array([True]), np.array([5]))
    with pytest.raises(InputError, match="expected pixels of a sensor of 130x97"):
        event_tensor(events, spec, 97, 130)


def test_where_no_cache_can_be_written_it_compiles_for_the_process(
    loops: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert loops._compiled(one_more)(2) == 3


def test_where_the_cache_fills_the_disk_it_compiles_for_the_process(
    loops: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caching = pytest.importorskip("numba.core.caching")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    call = loops._compiled(one_more)
    with caplog.at_level(logging.WARNING):
        assert [call(2), call(3)] == [3, 4]
    assert caplog.text.count("not kept") == 1


def one_more(number: int) -> int:
    return number + 1
