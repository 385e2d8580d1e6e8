"""`stepcell inspect` and `stepcell doctor` as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from stepcell.cli import main
from stepcell.cli.console import log, table
from stepcell.runtime.engine.build import build_engine
from stepcell.runtime.engine.options import BuildOptions


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def engine(denoiser_onnx: Path, tmp_path: Path) -> Path:
    shutil.copy(denoiser_onnx, tmp_path / "model.onnx")
    path = tmp_path / "model.engine"
    build_engine(tmp_path / "model.onnx", path, BuildOptions(opt_shapes={"x": (1, 3, 64, 96)}))
    return path


def test_contract_of_a_model_as_a_table(denoiser_onnx: Path) -> None:
    result = call("inspect", denoiser_onnx)
    assert result.exit_code == 0, result.output
    for words in (
        "batch x 8 x height // 2 x width // 2",
        "state_in.h -> state_out.h",
        "stepcell::ConvGRU",
        "3x3, soft gates, reset before",
        "height, width multiples of 2",
        "32 steps against torch float64: max error y ",
        "(float16 as written, accumulated in float32)",
    ):
        assert words in result.stdout
    assert json.loads(call("inspect", denoiser_onnx, "--json").stdout)["family"] == "denoiser"


def test_cells_of_ordinary_nodes_say_why(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from stepcell.exporter import export_onnx
    from stepcell.models import CellStack, ConvGRUCell

    export_onnx(CellStack([ConvGRUCell(3, 4), ConvGRUCell(4, 4, gates="hard")]), tmp_path / "m.onnx")
    assert "ordinary nodes: a file holds one variant of an op" in call("inspect", tmp_path / "m.onnx").stdout


def test_engine_as_a_table(engine: Path) -> None:
    result = call("inspect", engine)
    assert result.exit_code == 0, result.output
    for words in ("tensorrt-rtx 1.", "8.0, 8.6, 8.9, 12.0+", "none, native layers", "1x8x32x48", "as in the sidecar"):
        assert words in result.stdout
    assert json.loads(call("inspect", engine, "--json").stdout)["fingerprint"]["flavor"] == "tensorrt-rtx"


def test_changed_engine_is_refused(engine: Path) -> None:
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    result = call("inspect", engine)
    assert result.exit_code == 4
    assert "is not the file its sidecar describes: SHA-256 " in result.output


def test_files_that_are_nothing(tmp_path: Path) -> None:
    assert call("inspect", tmp_path / "missing.onnx").exit_code == 1
    (tmp_path / "text.onnx").write_text("no model")
    result = call("inspect", tmp_path / "text.onnx")
    assert result.exit_code == 1
    assert "is not an ONNX model" in result.output
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:])), tmp_path / "plain.onnx"
    )
    result = call("inspect", tmp_path / "plain.onnx")
    assert result.exit_code == 1
    assert "has no state contract" in result.output
    (tmp_path / "alone.engine").write_bytes(b"plan")
    assert call("inspect", tmp_path / "alone.engine").exit_code == 4


def test_doctor_says_what_is_there_and_what_is_missing() -> None:
    result = call("doctor", "--json")
    assert result.exit_code == 0, result.output
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["stepcell"]["ok"]
    assert findings["TensorRT-RTX"]["ok"]
    assert "torch" in findings["export"]["found"]
    for finding in findings.values():
        assert finding["ok"] or finding["costs"], f"{finding['what']}: missing, and nobody says what that costs"
    assert call("doctor").exit_code == 0


def test_doctor_on_a_bare_device() -> None:
    """Without any optional package: no traceback, and a command for each."""
    hidden = ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorrt", "tensorrt_rtx", "av", "cuda")
    code = (
        f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        "from stepcell.cli import main\nmain(['doctor', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}
    for what in ("export", "ONNX Runtime", "TensorRT-RTX", "CUDA bindings", "video"):
        assert not findings[what]["ok"]
        assert findings[what]["remedy"].startswith("pip install")


def test_table_keeps_extras_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    table("", ["remedy"], [["pip install 'stepcell[rtx]'"]], to_stdout=True)
    assert "stepcell[rtx]" in capsys.readouterr().out


def test_colons_in_a_message_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    log("--module here:x: cannot be imported")
    assert "here:x: cannot" in capsys.readouterr().err
