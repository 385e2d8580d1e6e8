"""Clips in actors of a Ray cluster, as far as one can be started here: `make fleet` has one with several nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepcell.errors import DeviceError, MissingDependencyError, UsageError
from stepcell.runtime.corpus.map_clips import map_clips
from stepcell.runtime.corpus.ray_pool import _check_port, _reason
from tests.cli.command import call

Model = Callable[..., Path]
ActorUnavailableError = type("ActorUnavailableError", (Exception,), {})


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.full((4 + number, 2, 2, 3), number + 1, np.uint8))
    return folder


def test_without_the_package(accumulator: Model, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    model, out = accumulator(), tmp_path / "out"
    with pytest.raises(MissingDependencyError, match="--engine ray needs the package 'ray'"):
        map_clips(model, clips, out, engine="ray")
    result = call("map", model, "-i", clips, "-o", out, "--engine", "ray")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "pip install 'stepcell[ray]'" in result.stderr
    assert [each.name for each in out.rglob("*")] == [".stepcell-map"]


def test_addresses_and_devices(accumulator: Model, clips: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--ray-address", "auto"), "--ray-address: is of --engine ray"),
        (
            ("--engine", "ray", "--ray-address", "ray://host:10001"),
            "expected HOST:PORT or auto, got 'ray://host:10001'",
        ),
        (("--engine", "ray", "--device", "cuda:1"), "--device cuda:1: Ray chooses the GPU of each worker"),
    ):
        result = call("map", accumulator(), "-i", clips, "-o", tmp_path / "out", *options)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    for address in ("host", "host:", ":6379", "host:port"):
        with pytest.raises(UsageError, match="--ray-address: expected HOST:PORT or auto"):
            _check_port(address)
    for address in ("127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"):
        with pytest.raises(DeviceError, match="Ray: no cluster at"):
            _check_port(address)
    _check_port("auto")


def test_what_ray_says_of_a_dead_worker() -> None:
    """As Ray 2.60 says it."""
    died = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: _RayWorker\n\tip: 127.0.0.3\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    )
    assert _reason(RuntimeError(died)) == "died on node 127.0.0.3 (RuntimeError; out of memory?)"
    assert _reason(ActorUnavailableError("The actor is unavailable: Socket closed")).startswith("no longer answers (")
    lost = died.replace("its worker process has died", "its node has died")
    assert _reason(RuntimeError(lost)) == "was lost with its node 127.0.0.3"


def test_a_cluster_for_one_run(
    accumulator: Model, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Outputs are those of the local pool, and Ray says nothing. Relative paths are those of the command."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'stepcell[ray]'; `make fleet` tests it")
    monkeypatch.chdir(tmp_path)
    model = accumulator().relative_to(tmp_path)
    (clips / "bad.npy").write_bytes(b"")
    local = map_clips(model, "clips", "local", workers=1)
    report = map_clips(model, "clips", "out", engine="ray", workers=2)
    assert (report.made, report.failed, report.workers) == (3, local.failed, 2)
    for number in range(3):
        assert Path(f"out/{number}.npy").read_bytes() == Path(f"local/{number}.npy").read_bytes()
    assert capfd.readouterr() == ("", "")
    assert map_clips(model, "clips", "out", engine="ray").finished_before == 3
