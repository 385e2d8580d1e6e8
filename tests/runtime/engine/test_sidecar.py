"""A changed byte anywhere, or a machine that differs, is refused before TensorRT loads the plan."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stepcell.errors import EngineMismatchError, InputError, MissingDependencyError
from stepcell.runtime import cuda
from stepcell.runtime.engine import engine_check
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.engine_check import check_engine, covers
from stepcell.runtime.engine.sidecar import Sidecar, read_sidecar, sidecar_path
from stepcell.runtime.engine.tensorrt_module import TensorRT


@pytest.fixture(scope="module")
def built(denoiser_onnx_fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_engine(denoiser_onnx_fixed, folder / "model.engine")
    return folder


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    for path in built.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "model.engine"


def rewrite(engine: Path, **changes: Any) -> None:
    """Change the fingerprint as its writer would: with a checksum that fits."""
    sidecar = read_sidecar(engine)
    fingerprint = msgspec.structs.replace(sidecar.fingerprint, **changes)
    sidecar_path(engine).write_text(msgspec.structs.replace(sidecar, fingerprint=fingerprint).to_json())


def test_untouched_engine_passes(engine: Path) -> None:
    assert check_engine(engine).sidecar == read_sidecar(engine)


def test_every_byte_of_the_sidecar_counts(engine: Path) -> None:
    path = sidecar_path(engine)
    data = path.read_bytes()
    generator = random.Random(0)
    with path.open("r+b", buffering=0) as file:  # in place: a file that is emptied and written takes ten times as long
        for position, byte in enumerate(data):
            file.seek(position)
            file.write(bytes([byte ^ generator.randrange(1, 256)]))
            with pytest.raises(EngineMismatchError):
                read_sidecar(engine)
            file.seek(position)
            file.write(bytes([byte]))
    assert path.read_bytes() == data
    for changed in (data[:-1], data + b" ", b"", b"{}", data.replace(b"\n", b"\r\n")):
        path.write_bytes(changed)
        with pytest.raises(EngineMismatchError):
            read_sidecar(engine)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "..", "", "a" * 300, "é" * 200])
def test_a_sealed_one_that_names_a_file_elsewhere_is_refused(engine: Path, name: str) -> None:
    sidecar = msgspec.structs.replace(read_sidecar(engine), onnx=name)
    sidecar_path(engine).write_text(sidecar.to_json())
    with pytest.raises(EngineMismatchError, match="onnx: expected the name of a file"):
        read_sidecar(engine)


def test_changed_sidecar_names_both_checksums(engine: Path) -> None:
    path = sidecar_path(engine)
    path.write_text(path.read_text().replace('"8.6"', '"8.7"'))
    with pytest.raises(EngineMismatchError) as caught:
        check_engine(engine)
    assert caught.value.exit_code == 4
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", caught.value.message))) == 2


@pytest.mark.parametrize("position", [0, 100, -1])
def test_changed_plan_names_both_hashes_and_the_rebuild(engine: Path, position: int) -> None:
    plan = bytearray(engine.read_bytes())
    plan[position] ^= 1
    engine.write_bytes(plan)
    with pytest.raises(EngineMismatchError) as caught:
        check_engine(engine)
    assert caught.value.exit_code == 4
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", caught.value.message))) == 2
    assert "stepcell build denoiser_fixed.onnx -o" in str(caught.value.hint)


def test_cut_or_missing_files(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-10])
    with pytest.raises(EngineMismatchError):
        check_engine(engine)
    sidecar_path(engine).unlink()
    with pytest.raises(EngineMismatchError, match=r"model\.engine\.json: not found"):
        check_engine(engine)
    engine.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        check_engine(engine)


def test_unknown_schema_is_refused(engine: Path) -> None:
    sidecar = msgspec.structs.replace(read_sidecar(engine), schema="2.0")
    sidecar_path(engine).write_text(sidecar.to_json())
    with pytest.raises(EngineMismatchError, match=r"schema 2\.0 is not supported; this stepcell reads 1\.x"):
        read_sidecar(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt": "1.6.0.1"}, "built with TensorRT-RTX 1.6.0.1, 1.7"),
        ({"platform": "Linux-riscv64"}, "built on Linux-riscv64, this is "),
        ({"plugin_version": "9", "plugin_sha256": "0" * 64}, "built with plugin version 9, this stepcell has 2"),
        ({"plugin_version": "2", "plugin_sha256": "0" * 64}, f"plugin interface {'0' * 64}, this stepcell has "),
    ],
)
def test_differences_name_both_values_and_the_rebuild(engine: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(engine, **changes)
    with pytest.raises(EngineMismatchError) as caught:
        check_engine(engine)
    assert message in caught.value.message
    assert "rebuild: stepcell build denoiser_fixed.onnx -o" in str(caught.value.hint)


def test_all_differences_are_told_at_once(engine: Path) -> None:
    rewrite(engine, tensorrt="1.6.0.1", platform="Linux-riscv64")
    with pytest.raises(EngineMismatchError, match=r"1\.6\.0\.1.*; built on Linux-riscv64"):
        check_engine(engine)


def test_engine_of_a_flavour_that_is_not_installed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    rewrite(engine, flavor="tensorrt")
    with pytest.raises(MissingDependencyError, match="the flavour 'tensorrt' needs"):
        check_engine(engine)


class _Validity:
    """Stands in for TensorRT-RTX's `Runtime`, whose answer needs a GPU."""

    engine_header_size = 64

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def __call__(self, logger: Any) -> _Validity:
        return self

    def get_engine_validity(self, header: bytes) -> tuple[str, int]:
        assert len(header) == 64
        return self.answer, 0


@pytest.mark.parametrize(
    ("flavor", "capability", "answer", "fits"),
    [
        ("tensorrt-rtx", "8.9", "INVALID", True),  # built for it: nobody is asked
        ("tensorrt-rtx", "12.1", "INVALID", True),  # "12.0 and later"
        ("tensorrt-rtx", "9.0", "INVALID", False),
        ("tensorrt-rtx", "9.0", "VALID", True),  # the vendor knows better
        ("tensorrt", "9.0", "VALID", False),
    ],
)
def test_gpu_is_compared_where_there_is_one(
    engine: Path, monkeypatch: pytest.MonkeyPatch, flavor: Any, capability: str, answer: str, fits: bool
) -> None:
    import tensorrt_rtx

    module = SimpleNamespace(
        __version__=tensorrt_rtx.__version__,
        ILogger=tensorrt_rtx.ILogger,
        Runtime=_Validity(answer),
        EngineValidity=SimpleNamespace(INVALID="INVALID"),
    )
    gpu = cuda.Gpu(0, "Test GPU", capability, 1 << 30)
    monkeypatch.setattr(engine_check, "load_tensorrt", lambda _: TensorRT(flavor, module))
    monkeypatch.setattr(cuda, "discover", lambda: cuda.Discovery((gpu,), "13.0", ""))
    monkeypatch.setattr(cuda, "use_device", lambda _: None)
    rewrite(engine, flavor=flavor)
    if fits:
        check_engine(engine)
        return
    with pytest.raises(EngineMismatchError) as caught:
        check_engine(engine)
    assert f"built for compute capability 8.0, 8.6, 8.9, 12.0+, Test GPU has {capability}" in caught.value.message
    assert ("--compute-capability 9.0" in str(caught.value.hint)) == (flavor == "tensorrt-rtx")


@pytest.mark.parametrize(
    ("installed", "fits"), [("10.3.0", True), ("10.13.2", True), ("11.0", True), ("10.2.9", False)]
)
def test_version_compatible_engine_loads_in_later_versions(
    engine: Path, monkeypatch: pytest.MonkeyPatch, installed: str, fits: bool
) -> None:
    sidecar = read_sidecar(engine)
    options = msgspec.structs.replace(sidecar.options, version_compatible=True)
    sidecar_path(engine).write_text(msgspec.structs.replace(sidecar, options=options).to_json())
    rewrite(engine, flavor="tensorrt", tensorrt="10.3.0")
    library = TensorRT("tensorrt", SimpleNamespace(__version__=installed))
    monkeypatch.setattr(engine_check, "load_tensorrt", lambda _: library)
    if fits:
        check_engine(engine)
        return
    with pytest.raises(EngineMismatchError, match=re.escape(f"built with TensorRT 10.3.0, {installed} is installed")):
        check_engine(engine)


def test_rtx_plans_move_between_systems_but_not_machines(engine: Path) -> None:
    machine = read_sidecar(engine).fingerprint.platform.partition("-")[2]
    rewrite(engine, platform=f"Windows-{machine}")
    check_engine(engine)


@pytest.mark.parametrize(
    ("targets", "capability", "expected"),
    [
        (("8.6", "8.9"), "8.6", True),
        (("8.6",), "8.9", False),
        (("8.0", "12.0+"), "12.1", True),
        (("8.0", "12.0+"), "9.0", False),
        (("12.0+",), "13.0", True),
        ((), "8.6", False),
    ],
)
def test_covers(targets: tuple[str, ...], capability: str, expected: bool) -> None:
    assert covers(targets, capability) is expected


def test_sidecar_text_is_stable(engine: Path) -> None:
    text = sidecar_path(engine).read_text()
    assert read_sidecar(engine).to_json() == text
    assert msgspec.json.decode(text, type=Sidecar).sealed().checksum in text
