"""Sidecar of an engine: the document `model.engine.json` beside `model.engine`.

The engine is a raw TensorRT plan that the vendor's tools can load. The sidecar has the state contract, and the
fingerprint that is compared before the plan is loaded. Its last field is the SHA-256 of the file with zeros in that
field, so any changed byte is detected.
"""

from __future__ import annotations

import platform
import shlex
from pathlib import Path

import msgspec

from stepcell import __version__
from stepcell.contract import StepContract
from stepcell.errors import EngineMismatchError, ParityError
from stepcell.files import read_bytes, write_atomic
from stepcell.json_text import decode_json
from stepcell.plugins.fp16_mirrors import Fp16Mirror
from stepcell.runtime.engine.layers import EngineLayer
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.profile import Profile
from stepcell.runtime.engine.tensorrt_module import Flavor
from stepcell.seal import ZEROS, check_seal, sealed

__all__ = [
    "SCHEMA",
    "Fingerprint",
    "PluginUse",
    "Sidecar",
    "Verification",
    "read_sidecar",
    "rebuild_command",
    "record_verification",
    "require_verified",
    "sidecar_path",
    "this_platform",
]

SCHEMA = "1.2"  # 1.1: half_copies, the name on disk of fp16_mirrors; 1.2: layers, verified
_FIELD = b'"checksum": "'
LONGEST_NAME = 255  # bytes of a file's name on Linux


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Source and target of a build.

    Attributes:
        flavor, tensorrt: flavour and exact version of the TensorRT that built the engine.
        compute_capabilities: GPUs that the engine runs on; "12.0+" means 12.0 and later.
        platform: system and machine, such as "Linux-x86_64".
        plugin_version, plugin_sha256: the plugin that must be registered to load it; None: no plugin.
        onnx_sha256: of the ONNX file.
        plan_sha256, plan_bytes: of the engine file.
    """

    flavor: Flavor
    tensorrt: str
    compute_capabilities: tuple[str, ...]
    platform: str
    plugin_version: str | None
    plugin_sha256: str | None
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int


class PluginUse(msgspec.Struct, frozen=True, kw_only=True):
    """Decision whether the fused plugin runs a model's cells; recorded in the sidecar.

    Attributes:
        used: whether the plugin is used.
        portable: it is used in the form that needs no stepcell to run.
        reason: reason of the decision, as text.
        cells: labels of the model's cells; empty if they were not determined.
        plugin_milliseconds, native_milliseconds: time of a step with and without the plugin on the device that
            built the engine; None: not timed.
    """

    used: bool
    reason: str
    portable: bool = False
    cells: tuple[str, ...] = ()
    plugin_milliseconds: float | None = None
    native_milliseconds: float | None = None


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """Record of an engine's verification: place, time, duration and tool.

    Attributes:
        passed: no verdict failed.
        failed: names of the verdicts that did.
        date: ISO 8601, UTC.
        device, compute_capability: of the GPU that ran it.
        driver: version of its driver.
        tensorrt: that ran it.
        steps, input, reference: what it was compared over and with.
        stepcell: version that verified it.
        plan_sha256: of the engine that was verified.
    """

    passed: bool
    failed: tuple[str, ...] = ()
    date: str
    device: str
    compute_capability: str
    driver: str
    tensorrt: str
    steps: int
    input: str
    reference: str
    stepcell: str
    plan_sha256: str

    def __str__(self) -> str:
        answer = "passed" if self.passed else f"failed ({', '.join(self.failed)})"
        return f"{answer} on {self.device}, driver {self.driver}, {self.date[:10]}: {self.steps} steps of {self.input}"


class Sidecar(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document.

    Attributes:
        schema: version `major.minor` of this document; an unknown major version is refused.
        stepcell: version that built the engine.
        onnx: name of the ONNX file.
        fingerprint: compared before the plan is loaded.
        profiles: sizes by graph input, data inputs first, then states.
        options: options of the build.
        plugin: whether the fused plugin is used, and why; None: it was switched off, or the model has no cells.
        fp16_mirrors: inputs and outputs of the engine that are not in the contract; "half_copies" on disk.
        compute_layers: number of convolutions and matrix products by dtype.
        build_seconds: duration of the build.
        contract: the state contract of the ONNX file.
        layers: kernels of the engine with their dtypes, as TensorRT listed them at the build.
        verified: by `stepcell verify`, the last time on each device and driver.
        checksum: SHA-256 of the file with zeros in place of this field.
    """

    schema: str = SCHEMA
    stepcell: str = __version__
    onnx: str
    fingerprint: Fingerprint
    profiles: dict[str, Profile]
    options: BuildOptions
    compute_layers: dict[str, int]
    build_seconds: float
    contract: StepContract
    plugin: PluginUse | None = None
    fp16_mirrors: tuple[Fp16Mirror, ...] = msgspec.field(default=(), name="half_copies")
    layers: tuple[EngineLayer, ...] = ()
    verified: tuple[Verification, ...] = ()
    checksum: str = ZEROS

    def sealed(self) -> Sidecar:
        """The same document with its checksum filled in."""
        return msgspec.json.decode(self.to_json(), type=Sidecar)

    def to_json(self) -> str:
        """The text of the file, with its checksum."""
        blank = msgspec.structs.replace(self, checksum=ZEROS)
        return sealed(msgspec.json.format(msgspec.json.encode(blank), indent=1) + b"\n", _FIELD).decode()


class _Head(msgspec.Struct):
    schema: str
    checksum: str
    contract: msgspec.Raw


def sidecar_path(engine: Path) -> Path:
    """`model.engine.json` for `model.engine`."""
    return engine.with_name(engine.name + ".json")


def this_platform() -> str:
    """System and machine of this process, such as "Linux-aarch64"."""
    return f"{platform.system()}-{platform.machine()}"


def read_sidecar(engine: Path) -> Sidecar:
    """Read the sidecar of an engine and verify its checksum.

    Raises:
        EngineMismatchError: it is missing, damaged, changed, or of an unknown major version.
        ContractError: the contract inside is of an unknown version.
    """
    path = sidecar_path(engine)
    if not path.is_file():
        raise EngineMismatchError(
            f"{path}: not found; without it {engine.name} cannot be loaded: it says what built the engine, for which "
            "GPU, and what its states are",
            hint="copy the .json file along with the engine, or build the engine again with `stepcell build`",
        )
    data = read_bytes(path)
    rebuild = "copy the file again, or build the engine again with `stepcell build`"
    head = decode_json(data, _Head, str(path), EngineMismatchError, what="is damaged", hint=rebuild)
    if head.schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise EngineMismatchError(
            f"{path}: schema {head.schema} is not supported; this stepcell reads {SCHEMA.split('.')[0]}.x",
            hint="update stepcell, or build the engine again with this version",
        )
    if found := check_seal(data, _FIELD, head.checksum):
        raise EngineMismatchError(
            f"{path}: was changed after it was written: its checksum says {head.checksum}, its content gives {found}",
            hint=rebuild,
        )
    StepContract.from_json(bytes(head.contract), subject=f"{path}: contract")
    sidecar = decode_json(data, Sidecar, str(path), EngineMismatchError, what="cannot be used", hint=rebuild)
    plain = Path(sidecar.onnx).name == sidecar.onnx and sidecar.onnx not in ("", "..")
    if not plain or len(sidecar.onnx.encode()) > LONGEST_NAME:
        raise EngineMismatchError(
            f"{path}: onnx: expected the name of a file, got {sidecar.onnx[:300]!r}", hint=rebuild
        )
    return sidecar


def record_verification(engine: Path, verification: Verification) -> None:
    """Add a line to the sidecar, in the place of an older one for the same device and driver.

    Raises:
        EngineMismatchError: the sidecar is missing or damaged, or belongs to another engine.
        OutputError: it cannot be written.
    """
    sidecar = read_sidecar(engine)
    if sidecar.fingerprint.plan_sha256 != verification.plan_sha256:
        raise EngineMismatchError(f"{engine}: its sidecar describes another engine than the one that was verified")
    others = [
        each for each in sidecar.verified if (each.device, each.driver) != (verification.device, verification.driver)
    ]
    write_atomic(
        sidecar_path(engine),
        msgspec.structs.replace(sidecar, schema=SCHEMA, verified=(*others, verification)).to_json(),
    )


def require_verified(sidecar: Sidecar, engine: Path, *, device: str, driver: str) -> Verification:
    """The line that says this engine passed on this device with this driver.

    Raises:
        ParityError: there is none, or it failed.
    """
    hint = f"stepcell verify {shlex.quote(str(engine))}"
    for each in sidecar.verified:
        if (each.device, each.driver, each.plan_sha256) == (device, driver, sidecar.fingerprint.plan_sha256):
            if each.passed:
                return each
            raise ParityError(f"{engine}: was verified on {device} and failed: {', '.join(each.failed)}", hint=hint)
    known = "; ".join(f"{each.device}, driver {each.driver}" for each in sidecar.verified) or "nowhere"
    raise ParityError(f"{engine}: was not verified on {device} with driver {driver} (verified: {known})", hint=hint)


def rebuild_command(sidecar: Sidecar, engine: Path, *, compute_capability: str | None = None) -> str:
    """The `stepcell build` command that rebuilds an engine.

    Args:
        compute_capability: target instead of those that the engine was built for.
    """
    flavor = sidecar.fingerprint.flavor
    options = msgspec.structs.replace(sidecar.options, flavor=flavor)
    if compute_capability is not None and flavor == "tensorrt-rtx":
        options = msgspec.structs.replace(options, compute_capabilities=(compute_capability,))
    beside = engine.parent / sidecar.onnx
    source = beside if beside.is_file() else Path(sidecar.onnx)
    return shlex.join(["stepcell", "build", str(source), "-o", str(engine), *options.arguments()])
