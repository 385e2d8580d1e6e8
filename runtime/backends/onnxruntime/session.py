"""Opening an ONNX file in ONNX Runtime: on the device that was asked for, or not at all."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, DeviceError, InputError
from stepcell.files import read_bytes
from stepcell.missing import require
from stepcell.onnx_model import read_model
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.backends.onnxruntime.split_convolutions import convolve_apart

__all__ = ["SizedSessions", "captures_graphs", "open_session"]

logger = logging.getLogger(__name__)

_CAPTURE = "enable_cuda_graph"
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are named alike
# Bytes of weights from which a model is run as it is: its other form takes a temporary file, perhaps in memory.
_LARGE = 1 << 28


class SizedSessions:
    """A model on the CPU, of which a session in a quicker form is made once the sizes are known."""

    def __init__(self, path: Path, model: bytes, threads: int | None, session: Any) -> None:
        self._path, self._model, self._threads = path, model, threads
        # Numbers, or texts in their place such as "height" and "height // 2".
        self._inputs: dict[str, list[int | str | None]] = {tensor.name: tensor.shape for tensor in session.get_inputs()}

    def session(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """A session for inputs of these shapes."""
        ort = require("onnxruntime", extra="ort", purpose="running a model")
        cpu = Device("cpu", 0)
        try:
            model = self._simplified(ort, shapes)
            convolve_apart(model)
            return _create(ort, self._path, model.SerializeToString(), cpu, _options(ort, self._threads))
        except Exception as error:  # such as no space in the folder for temporary files
            logger.warning(f"{self._path}: runs as it is, which is slower: {_reason(error)}")
            return _create(ort, self._path, self._model, cpu, _options(ort, self._threads))

    def _simplified(self, ort: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """The model without functions, with sizes and folded constants. ONNX Runtime only writes that to a file."""
        onnx = require("onnx", extra="ort", purpose="running a model")
        options = _options(ort, 1, only_basic=True)
        for name, shape in shapes.items():
            for text, size in zip(self._inputs[name], shape, strict=True):
                if isinstance(text, str):
                    options.add_free_dimension_override_by_name(text, size)
        with tempfile.TemporaryDirectory(prefix="stepcell-") as folder:
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            ort.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)


def open_session(
    path: Path, device: Device, *, keep_float16: bool, threads: int | None
) -> tuple[Any, StepContract, SizedSessions | None]:
    """An `onnxruntime.InferenceSession`, the contract of what it runs, and what makes quicker ones of known sizes.

    On the CPU a float16 model is opened in its float32 form unless `keep_float16`; the contract
    then says float32, and the log says so once. Errors: see `OrtBackend`.
    """
    ort = require("onnxruntime", extra="ort", purpose="running a model")
    if not path.is_file():
        read_bytes(path)  # says why it cannot be read
    model = _for_cpu(path, keep_float16) if device.kind == "cpu" else None
    options = _options(ort, threads, only_basic=model is not None)
    session = _create(ort, path, model or str(path), device, options)
    contract = _contract(session, path)
    _check_graph(session, contract, path)
    return session, contract, None if model is None else SizedSessions(path, model, threads, session)


def _for_cpu(path: Path, keep_float16: bool) -> bytes | None:
    """The model with its weights, in float32, for `SizedSessions`; None where the file is run as it is."""
    onnx = require("onnx", extra="ort", purpose="running a model")
    _, model = read_model(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    is_float16 = text is not None and StepContract.from_json(text, subject=str(path)).precision == "float16"
    if is_float16 and keep_float16:
        return None
    if sum(4 * math.prod(tensor.dims) for tensor in model.graph.initializer) > _LARGE and not is_float16:
        return None
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of many kinds: a missing file, a path outside the folder
        raise InputError(f"{path}: its weights are in another file, which cannot be read ({error})") from error
    if is_float16:
        model = to_float32(model)
        logger.info(f"{path}: float16 is slow on a CPU: running the same weights in float32")
    return bytes(model.SerializeToString())


def _options(ort: Any, threads: int | None, *, only_basic: bool = False) -> Any:
    options = ort.SessionOptions()
    options.use_deterministic_compute = True
    if threads is not None:
        options.intra_op_num_threads = threads
    if only_basic:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _create(ort: Any, path: Path, model: str | bytes, device: Device, options: Any) -> Any:
    if device.kind == "cuda":
        _require_cuda(ort, device)
    try:
        session = _session(ort, model, options, device)
    except Exception as error:  # onnxruntime's exceptions have no common base
        reason = _reason(error)
        if "Protobuf" in type(error).__name__:
            raise InputError(f"{path}: is not an ONNX model ({reason})") from error
        if device.kind == "cuda":
            raise DeviceError(f"{path}: cannot be opened on {device}: {reason}") from error
        raise InputError(f"{path}: ONNX Runtime cannot run this model: {reason}") from error
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(
            f"{device}: ONNX Runtime did not load its CUDA provider",
            hint="its messages above say which library is missing; `stepcell doctor` shows what loads",
        )
    return session


def _session(ort: Any, model: str | bytes, options: Any, device: Device) -> Any:
    """On CUDA with CUDA graphs, or without them where the graph has parts that cannot be captured."""
    create = functools.partial(ort.InferenceSession, model, options, enable_fallback=0)
    if device.kind == "cpu":
        return create(providers=["CPUExecutionProvider"])
    # The graph's dtypes say the precision: a float32 convolution is not computed in TF32.
    cuda_options = {"device_id": str(device.index), "use_tf32": "0"}
    captured = ("CUDAExecutionProvider", {**cuda_options, _CAPTURE: "1"})
    try:
        return create(providers=[captured, "CPUExecutionProvider"])
    except Exception as error:  # control flow, or nodes that only the CPU has
        session = create(providers=[("CUDAExecutionProvider", cuda_options), "CPUExecutionProvider"])
        logger.warning(f"{device}: runs without a CUDA graph, which is slower: {_reason(error)}")
        return session


def captures_graphs(session: Any) -> bool:
    """Whether a session on CUDA captures its runs as CUDA graphs."""
    found: str = session.get_provider_options().get("CUDAExecutionProvider", {}).get(_CAPTURE, "0")
    return found == "1"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _require_cuda(ort: Any, device: Device) -> None:
    """Ask for CUDA only where it can work: the request itself prints errors where it cannot."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceError(
            f"{device}: this ONNX Runtime ({ort.__version__}) was built without CUDA",
            hint="install onnxruntime-gpu in the place of onnxruntime, or use --device cpu",
        )
    count = cuda.device_count()
    if device.index >= count:
        raise DeviceError(
            f"{device}: this machine has {count or 'no'} CUDA device{'' if count == 1 else 's'}",
            hint="use --device cpu; `stepcell doctor` shows what this machine can do",
        )
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN from wheels, where they are installed
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _contract(session: Any, path: Path) -> StepContract:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ContractError(
            f"{path}: has no state contract (metadata key {METADATA_KEY}), so its states cannot be wired",
            hint="export the checkpoint with `stepcell export`, which writes one",
        )
    return StepContract.from_json(text, subject=str(path))


def _check_graph(session: Any, contract: StepContract, path: Path) -> None:
    """The contract must name every input and output of the graph, with its dtype."""
    sides = (
        ("inputs", session.get_inputs(), contract.graph_inputs),
        ("outputs", session.get_outputs(), contract.graph_outputs),
    )
    for side, tensors, specs in sides:
        expected: dict[str, str] = {name: spec.dtype for name, spec in specs.items()}
        actual = {t.name: _DTYPES.get(t.type, t.type.removeprefix("tensor(").removesuffix(")")) for t in tensors}
        if actual != expected:
            raise ContractError(
                f"{path}: the graph's {side} differ from its contract: expected {_listing(expected)}, "
                f"got {_listing(actual)}",
                hint="the file was changed after its export; export it again",
            )


def _listing(dtypes: dict[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(dtypes.items()))
