"""Small models whose arithmetic can be done in the head."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from stepcell.contract import METADATA_KEY, Spec, StateSpec, StepContract, TensorSpec
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell
from stepcell.models.zoo.clips import read_clip

if TYPE_CHECKING:
    from stepcell.runtime.tensorrt import TensorRTBackend
    from tests.runtime.pretended_gpu import Machine


def _write_model(path: Path, contract: StepContract, nodes: list[onnx.NodeProto], **graph: Any) -> Path:
    """An ONNX file whose graph has the inputs and outputs of the contract, and the contract in it."""

    def infos(specs: dict[str, Spec]) -> list[onnx.ValueInfoProto]:
        kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)) for name, spec in specs.items()}
        return [helper.make_tensor_value_info(name, kinds[name], spec.shape) for name, spec in specs.items()]

    body = helper.make_graph(nodes, "test", infos(contract.graph_inputs), infos(contract.graph_outputs), **graph)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def write_model() -> Callable[..., Path]:
    """`write_model(path, contract, nodes, **graph)` makes a model of one's own."""
    return _write_model


@pytest.fixture(params=["graphs", "kernels", "half copies"])
def machine(
    request: pytest.FixtureRequest, denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """A pretended GPU with an engine: steps captured as CUDA graphs, or queued kernel by kernel, or captured in an
    engine that takes the half copy of its state.
    """
    from tests.runtime.pretended_gpu import Machine

    made = Machine(denoiser_onnx, tmp_path, monkeypatch, half_copies=request.param == "half copies")
    made.engine.capturable = request.param != "kernels"
    return made


@pytest.fixture
def backend(machine: Machine) -> Iterator[TensorRTBackend]:
    """Opened on it; whatever it took must be given back at the end."""
    backend = machine.open()
    yield backend
    backend.close()
    assert not machine.engine.stale, f"{machine.engine.stale} values of a half copy were out of date"
    assert not machine.gpu.memory, "memory that was never freed"
    assert not machine.gpu.live, "streams, events or graphs that were never closed"


@pytest.fixture
def accumulator(tmp_path: Path) -> Callable[..., Path]:
    """Makes models of y = h' = h + x; keywords change the specs of x, y and h."""

    def make(
        name: str = "sum.onnx",
        *,
        shape: tuple[int | str, ...] = ("batch", 3, "height", "width"),
        dtype: Any = "float32",
        layout: str | None = "NCHW",
        **image: Any,
    ) -> Path:
        contract = StepContract(
            inputs=(TensorSpec(name="x", shape=shape, dtype=dtype, layout=layout, **image),),
            outputs=(TensorSpec(name="y", shape=shape, dtype=dtype, layout=layout, **image),),
            states=(StateSpec(name="h", shape=shape, dtype=dtype),),
            precision="float16" if dtype == "float16" else "float32",
        )
        nodes = [
            helper.make_node("Add", ["state_in.h", "x"], ["y"]),
            helper.make_node("Identity", ["y"], ["state_out.h"]),
        ]
        return _write_model(tmp_path / name, contract, nodes)

    return make


@pytest.fixture(scope="session")
def learned() -> CellStack:
    """A ConvGRU below a ConvLSTM whose states do not start at zero: h0 per channel, c1 one value for all."""
    torch.manual_seed(0)
    stack = CellStack([ConvGRUCell(3, 6), ConvLSTMCell(6, 4)])
    stack.initial = {"h0": torch.linspace(-0.5, 0.5, 6).reshape(6, 1, 1), "c1": torch.full((1, 1, 1), 0.7)}
    return stack


@pytest.fixture(scope="session")
def learned_onnx(exported: Path, learned: CellStack) -> Path:
    """The same as a float32 file."""
    path = exported / "learned.onnx"
    export_onnx(learned, path, precision="float32")
    return path


class Camera:
    """A camera on the network: MPEG-TS over TCP, from its first frame to whoever connects.

    Attributes:
        url: where it is, also after it was switched off and on.
        cut: send this share of the clip and hang up.
    """

    def __init__(self, frames: NDArray[np.uint8], fps: int = 25) -> None:
        self._data = _mpegts(frames, fps)
        self.cut = 1.0
        self.connections = 0
        self._server: socket.socket | None = None
        self._port = 0
        self.switch_on()

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def switch_on(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(self._server,), daemon=True)
        self._thread.start()

    def switch_off(self) -> None:
        if self._server is not None:
            self._server.shutdown(socket.SHUT_RDWR)  # wakes `accept`
            self._server.close()
            self._server = None
            self._thread.join()

    def _serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                self.connections += 1
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self._data[: round(len(self._data) * self.cut)])


def _mpegts(frames: NDArray[np.uint8], fps: int) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture
def camera() -> Iterator[Camera]:
    """60 frames of 176x144."""
    camera = Camera(read_clip("carphone_pristine")[:60])
    yield camera
    camera.switch_off()
