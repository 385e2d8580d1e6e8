"""ONNX Runtime sessions: opening an ONNX file on the requested device, or raising an error."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.errors import ContractError, DeviceError, InputError
from stepcell.external_weights import load_external_weights
from stepcell.files import read_bytes
from stepcell.library_errors import first_line, is_out_of_memory, library_errors
from stepcell.limits import FIRST_STEP_SECONDS, within_seconds
from stepcell.onnx_model import OnnxFile, missing_contract, read_onnx, repair_hint
from stepcell.optional_imports import require
from stepcell.runtime import cuda
from stepcell.runtime.backends.base import Device, Spin
from stepcell.runtime.backends.onnxruntime.drop_copies import drop_copies
from stepcell.runtime.backends.onnxruntime.float32_model import to_float32
from stepcell.runtime.backends.onnxruntime.int8_chains import chain_int8
from stepcell.runtime.backends.onnxruntime.plain_convolutions import keep_plain
from stepcell.runtime.backends.onnxruntime.split_convolutions import split_convolutions
from stepcell.runtime.backends.onnxruntime.trial import choose_level

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["SpecializedSessions", "captures_graphs", "open_session"]

logger = logging.getLogger(__name__)

_CAPTURE = "enable_cuda_graph"
_TRANSPOSERS = ["TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider"]  # optimisers that move Transpose nodes
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # other types have the same name in both
# From this size of the weights in bytes on, a model is not specialised: that takes a temporary file of the same size.
_LARGE_MODEL = 1 << 28


class SpecializedSessions:
    """A model on the CPU, to be specialised for fixed sizes once they are known.

    Args:
        path: the file, for messages.
        model: the model as bytes.
        threads, spin: as in `open_session`.
        session: session of the unchanged model.
    """

    def __init__(self, path: Path, model: bytes, threads: int | None, session: Any, *, spin: Spin) -> None:
        self._path, self._model, self._threads, self._spin = path, model, threads, spin
        # Shape by input: numbers, or text such as "height" and "height // 2".
        self._inputs: dict[str, list[int | str | None]] = {tensor.name: tensor.shape for tensor in session.get_inputs()}

    def session(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """A session specialised for inputs of these shapes, or of the unchanged model if that fails."""
        ort = require("onnxruntime", extra="ort", purpose="running a model")
        cpu = Device("cpu", 0)
        try:
            model = self.simplified(shapes)
            drop_copies(model)
            split_convolutions(model)
            keep_plain(model)
            fixed_layout = chain_int8(model) > 0
            options = _options(ort, self._threads, spin=self._spin)
            return _create(ort, self._path, model.SerializeToString(), cpu, options, fixed_layout=fixed_layout)
        except DeviceError:
            raise
        except Exception as error:  # for example no space for temporary files
            if is_out_of_memory(error):
                raise
            logger.warning(f"{self._path}: is not specialised for its sizes, which is slower: {first_line(error)}")
            return _create(ort, self._path, self._model, cpu, _options(ort, self._threads, spin=self._spin))

    def simplified(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelProto:
        """The model with functions inlined, sizes filled in and constants folded.

        ONNX Runtime can write such a model to a file only.
        """
        ort = require("onnxruntime", extra="ort", purpose="running a model")
        onnx = require("onnx", extra="ort", purpose="running a model")
        options = _options(ort, 1, only_basic=True)
        sizes = {
            text: size
            for name, shape in shapes.items()
            for text, size in zip(self._inputs[name], shape, strict=True)
            if isinstance(text, str)
        }
        for text, size in sizes.items():
            options.add_free_dimension_override_by_name(text, size)
        with tempfile.TemporaryDirectory(prefix="stepcell-") as folder:
            choose_level(self._model, options, str(self._path), sizes)
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            _session(ort, self._path, self._model, options, Device("cpu", 0))
            model: ModelProto = onnx.load(options.optimized_model_filepath)
            return model


def open_session(
    path: Path, device: Device, *, keep_float16: bool, threads: int | None, spin: Spin, check_file: bool = True
) -> tuple[Any, StepContract, SpecializedSessions | None]:
    """Open an ONNX file.

    On the CPU a float16 model is converted to float32 unless `keep_float16` is set; its contract then says float32,
    and that is logged. Arguments and errors are those of `OrtBackend`.

    Returns:
        An `onnxruntime.InferenceSession`, the contract of the model as it runs, and on the CPU the model to be
        specialised for fixed sizes; None: the session is used for all sizes.
    """
    ort = require("onnxruntime", extra="ort", purpose="running a model")
    if not path.is_file():
        read_bytes(path)  # raises an error that says why
    file = read_onnx(path, check=check_file)
    with library_errors(str(path), InputError, what="cannot be opened"):  # such as names that are not valid Unicode
        model = _for_cpu(file, keep_float16) if device.kind == "cpu" else None
        options = _options(ort, threads, spin=spin, only_basic=model is not None)
        session = _create(ort, path, model or str(path), device, options)
        contract = _contract(session, path)
        _check_graph(session, contract, path)
        if model is None:
            return session, contract, None
        return session, contract, SpecializedSessions(path, model, threads, session, spin=spin)


def _for_cpu(file: OnnxFile, keep_float16: bool) -> bytes | None:
    """The model with its weights, in float32, for `SpecializedSessions`; None: run the unchanged file."""
    model, is_float16 = file.model, file.contract.precision == "float16"
    if is_float16 and keep_float16:
        return None
    if sum(4 * math.prod(tensor.dims) for tensor in model.graph.initializer) > _LARGE_MODEL and not is_float16:
        return None
    load_external_weights(model, file.path)
    if is_float16:
        model = to_float32(model)
        logger.info(f"{file.path}: float16 is slow on a CPU: runs with the same weights in float32")
    return bytes(model.SerializeToString())


def _options(ort: Any, threads: int | None, *, spin: Spin = True, only_basic: bool = False) -> Any:
    options = ort.SessionOptions()
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # names in its messages are those of the file; errors are raised too
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if spin == "in step":
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if only_basic:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _create(
    ort: Any, path: Path, model: str | bytes, device: Device, options: Any, *, fixed_layout: bool = False
) -> Any:
    if device.kind == "cuda":
        _require_cuda(ort, device)
    else:
        choose_level(model, options, str(path))
    cuda_errors = device.kind == "cuda"
    what = f"cannot be opened on {device}" if cuda_errors else "ONNX Runtime cannot run this model"
    with library_errors(str(path), DeviceError if cuda_errors else InputError, what=what):
        session = _session(ort, path, model, options, device, fixed_layout=fixed_layout)
    if device.kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise DeviceError(
            f"{device}: ONNX Runtime did not load its CUDA provider",
            hint="its messages above say which library is missing; `stepcell doctor` shows what loads",
        )
    return session


def _session(
    ort: Any, path: Path, model: str | bytes, options: Any, device: Device, *, fixed_layout: bool = False
) -> Any:
    """A session; on CUDA with CUDA graphs, or without them if parts of the model cannot be captured.

    Args:
        fixed_layout: transpositions stay where they are in the graph.
    """
    create = functools.partial(ort.InferenceSession, model, options, enable_fallback=0)
    if device.kind == "cpu":
        disabled = _TRANSPOSERS if fixed_layout else None
        on_cpu = functools.partial(create, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
        return within_seconds(FIRST_STEP_SECONDS, on_cpu, f"{path}: loading in ONNX Runtime")
    # The dtypes of the graph determine the precision: float32 convolutions must not be computed in TF32.
    cuda_options = {"device_id": str(device.index), "use_tf32": "0"}
    captured = ("CUDAExecutionProvider", {**cuda_options, _CAPTURE: "1"})
    try:
        return create(providers=[captured, "CPUExecutionProvider"])
    except Exception as error:  # control flow, or nodes that only the CPU provider supports
        session = create(providers=[("CUDAExecutionProvider", cuda_options), "CPUExecutionProvider"])
        logger.warning(f"{device}: runs without a CUDA graph, which is slower: {first_line(error)}")
        return session


def captures_graphs(session: Any) -> bool:
    """Whether a session on CUDA uses CUDA graphs."""
    found: str = session.get_provider_options().get("CUDAExecutionProvider", {}).get(_CAPTURE, "0")
    return found == "1"


def _require_cuda(ort: Any, device: Device) -> None:
    """Raise an error if CUDA cannot work; ONNX Runtime would print errors of its own."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceError(
            f"{device}: this ONNX Runtime ({ort.__version__}) was built without CUDA",
            hint="install onnxruntime-gpu instead of onnxruntime, or use --device cpu",
        )
    count = cuda.device_count()
    if device.index >= count:
        raise DeviceError(
            f"{device}: this machine has {count or 'no'} CUDA device{'' if count == 1 else 's'}",
            hint="use --device cpu; `stepcell doctor` shows what this machine can do",
        )
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN from wheels, if they are installed
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _contract(session: Any, path: Path) -> StepContract:
    """The contract of a session's model, which has been checked."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise missing_contract(path)
    return StepContract.from_json(text, subject=str(path), check=False)


def _check_graph(session: Any, contract: StepContract, path: Path) -> None:
    """Raise ContractError unless the contract names every input and output of the graph with its dtype."""
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
                hint=f"the file was changed after its export: {repair_hint(path)}",
            )


def _listing(dtypes: dict[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(dtypes.items()))
