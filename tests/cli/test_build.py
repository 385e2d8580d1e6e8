from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.cli.console import console
from stepcell.runtime.engine.sidecar import read_sidecar


@pytest.fixture
def model(denoiser_onnx: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(denoiser_onnx, tmp_path / "model.onnx"))


def run(*arguments: str | Path) -> tuple[Result, str]:
    """The result, and everything that went to stderr."""
    with console.capture() as captured:
        result = CliRunner().invoke(main, ["build", *map(str, arguments)])
    return result, captured.get() + result.stderr


def test_defaults(model: Path) -> None:
    result, stderr = run(model)
    assert result.exit_code == 0, stderr
    assert result.stdout == ""
    engine = model.with_suffix(".engine")
    assert read_sidecar(engine).fingerprint.plan_bytes == engine.stat().st_size
    assert "as exported; others: --minShapes" in stderr
    assert "plugin:  off; TensorRT-RTX has no way" in stderr
    assert "6 of 6 convolutions and matrix products in float16" in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("built")
    assert "tensorrt-rtx" in last


@pytest.mark.parametrize(
    "spelling",
    [
        ("--minShapes", "--optShapes", "--maxShapes", "--builderOptimizationLevel", "--memPoolSize"),
        ("--min-shapes", "--opt-shapes", "--max-shapes", "--builder-optimization-level", "--mem-pool-size"),
    ],
    ids=["trtexec", "kebab-case"],
)
def test_all_options(model: Path, tmp_path: Path, spelling: tuple[str, ...]) -> None:
    low, best, high, level, pool = spelling
    output = tmp_path / "out.engine"
    result, stderr = run(
        *(model, "-o", output, "--flavor", "tensorrt-rtx", "--plugin", "off", "--compute-capability", "8.6,8.9"),
        *(low, "x:1x3x32x32", best, "x:1x3x64x64", high, "x:2x3x64x64", level, "1", pool, "workspace:1024", "--json"),
    )
    assert result.exit_code == 0, stderr
    info = json.loads(result.stdout)
    assert info["engine"] == str(output)
    contents = info["contents"]
    assert contents["fingerprint"]["compute_capabilities"] == ["8.6", "8.9"]
    assert contents["profiles"]["state_in.h"] == {
        "min": [1, 8, 16, 16],
        "opt": [1, 8, 32, 32],
        "max": [2, 8, 32, 32],
    }
    assert contents["options"]["optimization_level"] == 1
    assert contents["options"]["workspace_mib"] == 1024
    assert contents["checksum"] == read_sidecar(output).checksum


def test_verbose_shows_what_tensorrt_says(model: Path) -> None:
    _, quiet = run(model)
    result, verbose = run(model, "--verbose")
    assert result.exit_code == 0
    assert "[verbose]" in verbose
    assert "[verbose]" not in quiet


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--plugin", "on"], 5, "needs the Enterprise flavour"),
        (["--versionCompatible"], 2, "load only in the version that built them"),
        (["--compute-capability", "8.7"], 2, "does not build for 8.7"),
        (["--compute-capability", "orin"], 2, "expected MAJOR.MINOR"),
        (["--compute-capability", ""], 2, "expected MAJOR.MINOR"),
        (["--optShapes", "x=1,3,64,64"], 2, "--optShapes: expected NAME:AxBxC"),
        (["--optShapes", ""], 2, "--optShapes: expected NAME:AxBxC"),
        (["--optShapes", "x:1x3x63x64"], 2, "multiples of 2"),
        (["--maxShapes", "image:1x3x64x64"], 2, "has no input 'image'"),
        (["--memPoolSize", "1024"], 2, "expected workspace:MiB"),
        (["--builderOptimizationLevel", "6"], 2, "6 is not in the range 0<=x<=5"),
        (["--flavor", "trt"], 2, "'trt' is not one of"),
        (["-o", "missing/model.engine"], 1, "cannot be written"),
    ],
)
def test_bad_arguments(model: Path, arguments: list[str], code: int, message: str) -> None:
    result, stderr = run(model, *arguments)
    assert result.exit_code == code
    assert message in " ".join(stderr.split())
    assert result.stdout == ""
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_bad_models(model: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "no.onnx")[0].exit_code == 1
    (tmp_path / "cut.onnx").write_bytes(model.read_bytes()[:2000])
    result, stderr = run(tmp_path / "cut.onnx")
    assert result.exit_code == 1
    assert "is not an ONNX model" in stderr


def test_help_has_examples() -> None:
    result, _ = run("--help")
    assert result.exit_code == 0
    assert "stepcell build model.onnx -o model.engine --optShapes x:1x3x720x1280" in result.stdout
    for option in ("--minShapes, --min-shapes", "--timingCacheFile, --timing-cache-file", "--versionCompatible"):
        assert option in result.stdout
