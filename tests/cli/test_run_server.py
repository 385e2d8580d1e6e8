"""`stepcell run --server`: as without it, or refused with the reason; the server's side is in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepcell.runtime.remote import run_on_server as room
from stepcell.runtime.serving import triton_transport
from stepcell.runtime.serving.client_contract import PARAMETER, ServedModel, client_contract
from stepcell.runtime.serving.settings import Settings
from tests.cli.command import call
from tests.runtime.serving.network import EVERY, Network
from tests.runtime.serving.serving_model import order_model

URL = "http://127.0.0.1:8000"
Serve = Callable[..., Network]


@pytest.fixture
def model(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    return order_model(tmp_path / "order.onnx", write_model)


@pytest.fixture
def serve(model: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Takes the place of connections to a server."""

    def start(folder: Path | None = None, *, models: tuple[str, ...] = ("order",), **options: Any) -> Network:
        network = Network(model, folder, **{"pixels": True, **options})
        written = Settings(
            model="order.onnx", slots=2, pixels=network.pixels, snapshots=str(folder or ""), snapshot_every=EVERY
        ).parameters()
        written[PARAMETER] = client_contract(network.loop.contract, network.wire).to_sealed_json()

        class Transport:
            def __init__(self, url: str, model: str, **_: object) -> None:
                assert url == URL

            def models(self) -> list[str]:
                return list(models)

            def served(self) -> ServedModel:
                return ServedModel.from_parameters(written, "server: order")

            infer, close = staticmethod(network.infer), staticmethod(network.close)

        for module in (room, triton_transport):
            monkeypatch.setattr(module, "TritonTransport", Transport)
        return network

    return start


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    found = []
    for seed, count in enumerate((24, 15)):
        found.append(tmp_path / f"{seed}.npy")
        np.save(found[-1], np.random.default_rng(seed).integers(0, 256, (count, 2, 4, 3), np.uint8))
    return found


def run(*arguments: object, clips: list[Path], folder: Path, suffix: str = "") -> Any:
    words: list[object] = ["run", *arguments]
    for clip in clips:
        words += ["--input", clip, "--output", folder / f"{clip.stem}{suffix}"]
    return call(*words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outputs_are_those_of_a_local_run_byte_by_byte(
    model: Path, serve: Serve, clips: list[Path], tmp_path: Path
) -> None:
    serve(tmp_path / "snapshots", hurt=0.05)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert run(model, "--backend", "onnxruntime", "--reset-every", 10, clips=clips, folder=here).exit_code == 0
    result = run("--server", URL, "--reset-every", 10, "--json", clips=clips, folder=there)
    assert result.exit_code == 0, result.stderr
    assert contents(here) == contents(there)
    assert len(contents(here)) == 39
    report = json.loads(result.stdout)
    assert report["model"] == "order"
    assert [(each["frames"], each["resets"]["every"]) for each in report["streams"]] == [(24, 2), (15, 1)]
    assert sum(each["server_events"]["unreachable"] for each in report["streams"]) > 0
    assert "server: " in result.stderr


def test_clips_one_after_another_are_streams_of_their_own(
    model: Path, serve: Serve, clips: list[Path], tmp_path: Path
) -> None:
    serve(slots=1)
    folder = tmp_path / "many"
    folder.mkdir()
    for clip in clips:
        clip.rename(folder / clip.name)
    refused = call("run", "--server", URL, "--input", folder, "--output", tmp_path / "tensors")
    assert "this server answers with pixels" in refused.stderr
    serve(slots=1, pixels=False)
    outputs = tmp_path / "here", tmp_path / "there"
    for output, which in zip(outputs, ((model, "--backend", "onnxruntime"), ("--server", URL)), strict=True):
        result = call("run", *which, "--input", folder, "--output", output)
        assert result.exit_code == 0, result.stderr
    assert contents(outputs[0]) == contents(outputs[1]) != {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--device", "cuda"), "--device with --server: the server's machine steps the frames"),
        (("--backend", "ncnn"), "--backend with --server"),
        (("--threads", 2), "--threads with --server"),
        (("--no-check",), "--no-check with --server"),
        (("--require-verified",), "--require-verified with --server"),
        (("--snapshot", "s.safetensors"), "--snapshot with --server: the states are the server's"),
        (("--resume",), "--resume with --server"),
        (("--range", "0,1"), "--range with --server: the contract of the served model says it"),
        (("--server-wait", "nan"), "expected a number"),
    ],
)
def test_what_is_the_servers_is_refused(
    serve: Serve, clips: list[Path], tmp_path: Path, options: tuple[object, ...], reason: str
) -> None:
    serve()
    result = run("--server", URL, *options, clips=clips[:1], folder=tmp_path, suffix="-out")
    assert result.exit_code == 2
    assert reason in result.stderr


def test_tensors_are_not_made_of_pixels(serve: Serve, clips: list[Path], tmp_path: Path) -> None:
    serve()
    result = run("--server", URL, clips=clips[:1], folder=tmp_path, suffix="-out.npy")
    assert result.exit_code == 2
    assert "this server answers with pixels" in result.stderr
    assert "--frames tensors" in result.stderr


def test_a_server_of_tensors_writes_them(model: Path, serve: Serve, clips: list[Path], tmp_path: Path) -> None:
    serve(pixels=False)
    assert run(model, "--backend", "onnxruntime", clips=clips, folder=tmp_path, suffix="-here.npy").exit_code == 0
    assert run("--server", URL, clips=clips, folder=tmp_path, suffix="-there.npy").exit_code == 0
    for clip in clips:
        here, there = (np.load(tmp_path / f"{clip.stem}-{where}.npy") for where in ("here", "there"))
        assert here.dtype == there.dtype == np.float32
        assert np.array_equal(here, there)
    result = run("--server", URL, "--on-nonfinite", "reset", clips=clips, folder=tmp_path, suffix="-b.npy")
    assert result.exit_code == 2
    assert "a server of tensors takes no NaN" in result.stderr


def test_the_model_is_the_only_one_or_named(serve: Serve, clips: list[Path], tmp_path: Path) -> None:
    where: dict[str, Any] = {"clips": clips[:1], "folder": tmp_path, "suffix": "-out"}
    serve(models=("order", "other"))
    result = run("--server", URL, **where)
    assert result.exit_code == 2
    assert "has 2 models: order, other" in result.stderr
    assert f"stepcell run order --server {URL}" in result.stderr
    result = run("order.onnx", "--server", URL, **where)
    assert result.exit_code == 2
    assert "is a name on the server, not a file" in result.stderr
    assert run("order", "--server", URL, **where).exit_code == 0
    serve(models=())
    assert "has 0 models: none" in run("--server", URL, **where).stderr


def test_options_without_what_they_need(clips: list[Path], tmp_path: Path) -> None:
    result = run(clips=clips[:1], folder=tmp_path, suffix="-out")
    assert result.exit_code == 2
    assert "MODEL: expected an .onnx file or an engine" in result.stderr
    result = run("model.onnx", "--server-wait", 5, clips=clips[:1], folder=tmp_path, suffix="-out")
    assert result.exit_code == 2
    assert "--server-wait needs --server URL" in result.stderr
    result = run("model.onnx", "--shared-memory", clips=clips[:1], folder=tmp_path, suffix="-out")
    assert result.exit_code == 2
    assert "--shared-memory needs --server URL" in result.stderr
