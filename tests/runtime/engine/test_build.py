"""Real builds with TensorRT-RTX, which needs no GPU to build."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stepcell.errors import BuildError, MissingDependencyError, OutputError, PluginError, UsageError
from stepcell.runtime.engine.build import EngineInfo, build_engine
from stepcell.runtime.engine.engine_check import check_engine
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.profile import Profile
from stepcell.runtime.engine.sidecar import read_sidecar, rebuild_command, sidecar_path, this_platform
from tests.runtime.engine.lines_logged import lines_logged


def build(onnx: Path, folder: Path, **options: Any) -> tuple[EngineInfo, list[str]]:
    with lines_logged() as said:
        info = build_engine(onnx, folder / "model.engine", BuildOptions(**options))
    return info, said


@pytest.mark.parametrize("target", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_builds_for_one_gpu(denoiser_onnx_fixed: Path, tmp_path: Path, target: str) -> None:
    info, _ = build(denoiser_onnx_fixed, tmp_path, compute_capabilities=(target,))
    assert info.contents.fingerprint.compute_capabilities == (target,)
    assert check_engine(tmp_path / "model.engine").plan == (tmp_path / "model.engine").read_bytes()


def test_builds_for_several_gpus_and_what_is_built_depends_on_them(denoiser_onnx_fixed: Path, tmp_path: Path) -> None:
    plans = set()
    for targets in ((), ("8.6", "8.9"), ("7.5",), ("7.5", "12.0")):
        info, _ = build(denoiser_onnx_fixed, tmp_path, compute_capabilities=targets)
        assert info.contents.fingerprint.compute_capabilities == (targets or ("8.0", "8.6", "8.9", "12.0+"))
        plans.add(info.contents.fingerprint.plan_sha256)
    assert len(plans) == 4


def test_dynamic_profile_with_derived_states(denoiser_onnx: Path, tmp_path: Path) -> None:
    info, said = build(
        denoiser_onnx,
        tmp_path,
        min_shapes={"x": (1, 3, 64, 64)},
        opt_shapes={"x": (1, 3, 128, 160)},
        max_shapes={"x": (4, 3, 256, 256)},
    )
    assert info.contents.profiles == {
        "x": Profile((1, 3, 64, 64), (1, 3, 128, 160), (4, 3, 256, 256)),
        "state_in.h": Profile((1, 8, 32, 32), (1, 8, 64, 80), (4, 8, 128, 128)),
    }
    assert not [line for line in said if line.startswith("sizes")]


def test_exported_sizes_are_used_and_said_where_none_are_given(denoiser_onnx: Path, tmp_path: Path) -> None:
    info, said = build(denoiser_onnx, tmp_path)
    example = info.contents.contract.example
    assert info.contents.profiles["x"].max == (example["batch"], 3, example["height"], example["width"])
    assert any("as exported; others: --minShapes" in line for line in said)


def test_states_of_gru_and_lstm_together(stack_onnx: Path, tmp_path: Path) -> None:
    info, _ = build(stack_onnx, tmp_path, opt_shapes={"x": (2, 3, 32, 48)})
    assert {name: profile.opt for name, profile in info.contents.profiles.items()} == {
        "x": (2, 3, 32, 48),
        "state_in.h0": (2, 6, 32, 48),
        "state_in.h1": (2, 4, 32, 48),
        "state_in.c1": (2, 4, 32, 48),
    }
    assert info.contents.compute_layers == {"float16": 3}


def test_precision_is_that_of_the_graph(denoiser_onnx: Path, denoiser_onnx_float32: Path, tmp_path: Path) -> None:
    half, _ = build(denoiser_onnx, tmp_path)
    single, _ = build(denoiser_onnx_float32, tmp_path)
    assert set(half.contents.compute_layers) == {"float16"}
    assert set(single.contents.compute_layers) == {"float32"}
    assert half.contents.compute_layers["float16"] == single.contents.compute_layers["float32"] > 0
    assert half.contents.fingerprint.plan_bytes < single.contents.fingerprint.plan_bytes


def test_sidecar_is_complete(denoiser_onnx: Path, tmp_path: Path) -> None:
    import tensorrt_rtx

    info, _ = build(denoiser_onnx, tmp_path)
    sidecar, plan = read_sidecar(tmp_path / "model.engine"), (tmp_path / "model.engine").read_bytes()
    assert sidecar == info.contents
    fingerprint = sidecar.fingerprint
    assert fingerprint.flavor == "tensorrt-rtx"
    assert fingerprint.tensorrt == tensorrt_rtx.__version__
    assert fingerprint.platform == this_platform()
    assert (fingerprint.plugin_version, fingerprint.plugin_sha256) == (None, None)
    assert fingerprint.onnx_sha256 == hashlib.sha256(denoiser_onnx.read_bytes()).hexdigest()
    assert (fingerprint.plan_sha256, fingerprint.plan_bytes) == (hashlib.sha256(plan).hexdigest(), len(plan))
    assert sidecar.contract.states[0].name == "h"
    assert sidecar.build_seconds > 0
    assert plan[:8] != b'{\n "sche'  # a raw plan: nothing is put before it


def test_options_reach_tensorrt(denoiser_onnx_fixed: Path, tmp_path: Path) -> None:
    info, _ = build(denoiser_onnx_fixed, tmp_path, optimization_level=0, workspace_mib=512)
    assert info.contents.options.workspace_mib == 512
    with pytest.raises(BuildError, match="workspace"):
        build(denoiser_onnx_fixed, tmp_path, workspace_mib=1, opt_shapes={"x": (1, 3, 64, 96)})


def test_a_failed_build_leaves_the_old_engine(denoiser_onnx: Path, tmp_path: Path) -> None:
    build(denoiser_onnx, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BuildError):
        build(denoiser_onnx, tmp_path, workspace_mib=1, opt_shapes={"x": (4, 3, 512, 512)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_crash_between_the_two_files_is_noticed(denoiser_onnx: Path, tmp_path: Path) -> None:
    from stepcell.errors import EngineMismatchError

    engine = tmp_path / "model.engine"
    build(denoiser_onnx, tmp_path, opt_shapes={"x": (1, 3, 64, 64)})
    old_plan, old_sidecar = engine.read_bytes(), sidecar_path(engine).read_bytes()
    build(denoiser_onnx, tmp_path, opt_shapes={"x": (1, 3, 128, 128)})
    sidecar_path(engine).write_bytes(old_sidecar)
    with pytest.raises(EngineMismatchError):
        check_engine(engine)
    engine.write_bytes(old_plan)
    check_engine(engine)


def test_plugin_on_is_refused_and_auto_says_what_happens(denoiser_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="needs the Enterprise flavour") as caught:
        build(denoiser_onnx, tmp_path, plugin="on")
    assert caught.value.exit_code == 5
    _, said = build(denoiser_onnx, tmp_path, plugin="auto")
    assert any(line.startswith("plugin:  off; TensorRT-RTX has no way") for line in said)
    _, said = build(denoiser_onnx, tmp_path, plugin="off")
    assert not [line for line in said if "plugin" in line]


def test_the_reason_why_rtx_has_no_plugin_is_still_true() -> None:
    import tensorrt_rtx

    assert not hasattr(tensorrt_rtx.INetworkDefinition, "add_plugin_v3")


def test_timing_cache_is_ignored_with_a_warning(denoiser_onnx_fixed: Path, tmp_path: Path) -> None:
    _, said = build(denoiser_onnx_fixed, tmp_path, timing_cache=str(tmp_path / "timing.cache"))
    assert any("--timingCacheFile is ignored" in line for line in said)
    assert not (tmp_path / "timing.cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ("8.7", "8.6")}, "does not build for 8.7 (it does for 7.5, 8.0, 8.6, 8.9, 12.0"),
        ({"version_compatible": True}, "load only in the version that built them"),
        ({"optimization_level": 6}, "expected 0 to 5, got 6"),
        ({"workspace_mib": 0}, "at least 1 MiB, got 0"),
        ({"flavor": "trt"}, "expected auto, tensorrt or tensorrt-rtx, got 'trt'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    denoiser_onnx: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build(denoiser_onnx, tmp_path, **options)
    assert message in caught.value.message
    assert not list(tmp_path.iterdir())


def test_missing_flavour_names_its_extra(denoiser_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError) as caught:
        build(denoiser_onnx, tmp_path, flavor="tensorrt")
    assert caught.value.hint is not None


def test_output_that_cannot_be_written_is_refused_before_the_build(denoiser_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        build_engine(denoiser_onnx, tmp_path / "missing" / "model.engine")
    (tmp_path / "model.engine").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        build(denoiser_onnx, tmp_path)
    copy = tmp_path / "model.onnx"
    copy.write_bytes(denoiser_onnx.read_bytes())
    with pytest.raises(UsageError, match="also used as the model"):
        build_engine(copy, tmp_path / "." / "model.onnx")
    assert copy.read_bytes() == denoiser_onnx.read_bytes()


def test_rebuild_command_repeats_the_options(denoiser_onnx: Path, tmp_path: Path) -> None:
    info, _ = build(
        denoiser_onnx,
        tmp_path,
        opt_shapes={"x": (1, 3, 64, 64)},
        max_shapes={"x": (2, 3, 64, 64)},
        optimization_level=0,
        workspace_mib=512,
        plugin="off",
    )
    engine = tmp_path / "model.engine"
    expected = (
        f"stepcell build {denoiser_onnx.name} -o {engine} --flavor tensorrt-rtx --plugin off --optShapes x:1x3x64x64 "
        "--maxShapes x:2x3x64x64 --builderOptimizationLevel 0 --memPoolSize workspace:512"
    )
    assert rebuild_command(info.contents, engine) == expected
    assert rebuild_command(info.contents, engine, compute_capability="7.5").count("--compute-capability 7.5") == 1
    (tmp_path / denoiser_onnx.name).write_bytes(denoiser_onnx.read_bytes())
    assert f"stepcell build {tmp_path / denoiser_onnx.name} -o" in rebuild_command(info.contents, engine)


def test_result_is_json(denoiser_onnx_fixed: Path, tmp_path: Path) -> None:
    info, _ = build(denoiser_onnx_fixed, tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(info), type=EngineInfo) == info
