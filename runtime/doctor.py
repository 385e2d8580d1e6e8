"""Diagnosis of a machine: which parts of stepcell work, found by using them rather than by listing packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys

import msgspec

from stepcell import __version__
from stepcell.errors import MissingDependencyError, StepcellError
from stepcell.optional_imports import require
from stepcell.plugins.prepare import plugin_unavailable
from stepcell.runtime import cuda
from stepcell.runtime.engine.tensorrt_module import FLAVORS, load_tensorrt

__all__ = ["Finding", "examine"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one part.

    Attributes:
        what: for example "TensorRT-RTX".
        ok: whether it works.
        found: version and details, or why it does not work.
        costs: what cannot be done without it.
        remedy: the command that adds it, or empty.
    """

    what: str
    ok: bool
    found: str
    costs: str = ""
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in the order from checkpoint to device."""
    gpus = cuda.discover()
    return [
        Finding(what="stepcell", ok=True, found=f"{__version__}, Python {platform.python_version()}, {_machine()}"),
        _packages(
            "export",
            ("torch", "onnx", "onnxscript", "safetensors"),
            "`stepcell export`",
            "pip install 'stepcell[export]'",
        ),
        _onnxruntime(),
        _onnxruntime_cuda(),
        _packages("ncnn", ("ncnn",), "convolutions of 3x3 are slower on a CPU", "pip install 'stepcell[ncnn]'"),
        *(_tensorrt(flavor) for flavor in FLAVORS),
        _plugin(),
        _gpu(gpus),
        _packages(
            "CUDA bindings",
            ("cuda.bindings",),
            "running an engine on a GPU",
            "pip install 'stepcell[cuda]'",
        ),
        _video(),
    ]


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}"


def _packages(what: str, modules: tuple[str, ...], costs: str, remedy: str) -> Finding:
    versions = []
    for module in modules:
        try:
            loaded = importlib.import_module(module)
        except (ImportError, OSError) as error:
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"does not load: {error}"
            return Finding(what=what, ok=False, found=f"{module}: {reason}", costs=costs, remedy=remedy)
        version = getattr(loaded, "__version__", None) or importlib.metadata.version(module.replace(".", "-"))
        versions.append(f"{module} {version}")
    return Finding(what=what, ok=True, found=", ".join(versions))


def _onnxruntime() -> Finding:
    return _packages("ONNX Runtime", ("onnxruntime",), "running an .onnx file", "pip install 'stepcell[ort]'")


def _onnxruntime_cuda() -> Finding:
    """Whether the CUDA provider runs a model. Without a GPU it is not tried, since it would print errors."""
    what, costs = "ONNX Runtime CUDA", "an .onnx file runs on the CPU only"
    remedy = "pip install 'stepcell[ort]' instead of onnxruntime; CUDA and cuDNN libraries must be found"
    try:
        import onnxruntime
    except (ImportError, OSError):
        return Finding(what=what, ok=False, found="no onnxruntime", costs=costs, remedy=remedy)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return Finding(what=what, ok=False, found="not in this build of onnxruntime", costs=costs, remedy=remedy)
    if not cuda.device_count():
        return Finding(what=what, ok=False, found="built in, but there is no GPU", costs=costs)
    session = onnxruntime.InferenceSession(_identity_model(), providers=["CUDAExecutionProvider"])
    loaded = "CUDAExecutionProvider" in session.get_providers()
    found = "loads" if loaded else "built in, but does not load"
    return Finding(what=what, ok=loaded, found=found, costs=costs, remedy=remedy)


def _identity_model() -> bytes:
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["": 17]> identity (float[1] x) => (float[1] y) { y = Identity(x) }'
    return bytes(onnx.parser.parse_model(text).SerializeToString())


def _tensorrt(flavor: str) -> Finding:
    name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[flavor]
    costs = {
        "tensorrt": "engines for Jetson and data-centre GPUs",
        "tensorrt-rtx": "engines for RTX GPUs, built without one",
    }[flavor]
    remedy = {
        "tensorrt": "on a Jetson it is part of JetPack; elsewhere pip install 'stepcell[tensorrt]'",
        "tensorrt-rtx": "pip install 'stepcell[rtx]'",
    }[flavor]
    try:
        library = load_tensorrt(flavor)
    except StepcellError as error:
        reason = "not installed" if "not installed" in error.message else error.message
        return Finding(what=name, ok=False, found=reason, costs=costs, remedy=remedy)
    return Finding(what=name, ok=True, found=library.version)


def _plugin() -> Finding:
    """Running an engine with the plugin needs TensorRT; building one needs Triton as well."""
    what, costs = "fused plugin", "engines run recurrent cells as TensorRT's own layers"
    try:
        module = load_tensorrt("tensorrt").module
    except StepcellError:
        return Finding(what=what, ok=False, found="needs TensorRT; TensorRT-RTX cannot host it", costs=costs)
    reason = plugin_unavailable("tensorrt", module)
    if reason:
        return Finding(what=what, ok=False, found=reason.partition(";")[0], costs=costs)
    return _packages(
        what,
        ("triton",),
        "`build --plugin` needs it to compile kernels; running engines does not",
        "pip install 'stepcell[kernels]'",
    )


def _gpu(gpus: cuda.Discovery) -> Finding:
    if not gpus.devices:
        return Finding(
            what="GPU", ok=False, found=gpus.problem, costs="models run on the CPU; engines build, but do not run"
        )
    names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus.devices)
    return Finding(what="GPU", ok=True, found=f"{names}, driver for CUDA {gpus.driver}")


def _video() -> Finding:
    costs, remedy = "reading and writing clips; .npy still works", "pip install 'stepcell[video]'"
    found = _packages("video", ("av",), costs, remedy)
    if not found.ok:
        return found
    try:
        av = require("av", extra="video", purpose="video")
    except MissingDependencyError as error:  # it is too old
        return Finding(what="video", ok=False, found=error.message, costs=costs, remedy=remedy)
    encoders = [name for name in ("libx264", "h264", "mpeg4") if name in av.codecs_available]
    camera = "" if sys.platform.startswith("linux") else ", cameras only on Linux"
    return msgspec.structs.replace(found, found=f"{found.found}, encoders {', '.join(encoders)}{camera}")
