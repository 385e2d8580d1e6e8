"""Opening an ONNX file in ONNX Runtime: on the device that was asked for, or not at all."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

from stepcell.console import log
from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, DeviceError, InputError
from stepcell.files import read_bytes
from stepcell.missing import require
from stepcell.onnx_model import read_model
from stepcell.runtime import cuda
from stepcell.runtime.backend import Device
from stepcell.runtime.cpu_form import convolve_apart
from stepcell.runtime.float32 import to_float32

__all__ = ["captures_graphs", "open_session"]

_CAPTURE = "enable_cuda_graph"
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are named alike


def open_session(path: Path, device: Device, *, keep_float16: bool, threads: int | None) -> tuple[Any, StepContract]:
    """An `onnxruntime.InferenceSession` and the contract of what it runs.

    On the CPU a float16 model is opened in its float32 form unless `keep_float16`; the contract
    then says float32, and the log says so once. Errors: see `OrtBackend`.
    """
    ort = require("onnxruntime", extra="ort", purpose="running a model")
    if not path.is_file():
        read_bytes(path)  # says why it cannot be read
    model = _for_cpu(path, keep_float16) if device.kind == "cpu" else None
    session = _create(ort, path, model or str(path), device, threads)
    contract = _contract(session, path)
    _check_graph(session, contract, path)
    return session, contract


def _for_cpu(path: Path, keep_float16: bool) -> bytes | None:
    """The model in the form that a CPU is quicker with; None if that is the file itself."""
    onnx = require("onnx", extra="ort", purpose="running a model")
    _, model = read_model(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    is_float16 = text is not None and StepContract.from_json(text, subject=str(path)).precision == "float16"
    if is_float16 and keep_float16:
        return None
    if not convolve_apart(model) and not is_float16:
        return None
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of many kinds: a missing file, a path outside the folder
        raise InputError(f"{path}: its weights are in another file, which cannot be read ({error})") from error
    if is_float16:
        model = to_float32(model)
        log(f"{path}: float16 is slow on a CPU: running the same weights in float32")
    return bytes(model.SerializeToString())


def _create(ort: Any, path: Path, model: str | bytes, device: Device, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.use_deterministic_compute = True
    if threads is not None:
        options.intra_op_num_threads = threads
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
        log(f"{device}: runs without a CUDA graph, which is slower: {_reason(error)}")
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
