"""The CPU benchmarks run in their quick mode and their results hold what reports are made of. No times are judged."""

from __future__ import annotations

import importlib
import json
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from stepcell.errors import InputError, ParityError
from stepcell.models import CellStack, ConvGRUCell

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "loop.json"
MODULES = (
    "loop",
    "loops",
    "loop_cases",
    "loop_report",
    "other_version",
    "overhead",
    "evaluator",
    "map",
    "pipeline",
    "pixels",
    "ncnn_step",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Imports a benchmark as if it were started with these arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str, *arguments: object) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def result(**loops: list[float]) -> dict[str, Any]:
    """A result of one shape; a loop without times has not run."""
    found = {name: {"error": 0.0, "milliseconds": times} for name, times in loops.items() if times}
    shape = {"name": "a < b", "frame": [1, 2, 3, 4], "threads": 1, "rounds": 3, "steps_per_round": 2}
    shape["loops"] = {name: found.get(name, {"not_run": "no compiler"}) for name in loops}
    versions = {"python": "3", "onnxruntime": "1", "torch": "2"}
    rest = {"cpu": "CPU", "cores": 2, "load_before": [0.1] * 3, "load_after": [0.2] * 3}
    return {"versions": versions, "shapes": [shape], **rest}


SMALL = {
    "StepLoop": [1.0, 2.0, 10.0],
    "StepLoop, check_finite=False": [0.5, 2.0, 10.0],
    "session.run": [2.0, 4.0, 10.0],
    "torch eager": [8.0, 8.0, 8.0],
    "torch eager, channels last": [6.0, 6.0, 60.0],
    "torch.compile": [],
    "a matrix product of as many operations": [0.5, 0.5, 0.5],
}


@pytest.mark.slow
def test_loop_quick(script: Callable[..., ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "loop.json"
    loop = script("loop", "--quick", "--threads", 1, "--output", output)
    assert loop.main() == 0
    found = json.loads(output.read_text())
    assert len(found["load_before"]) == len(found["load_after"]) == 3
    assert {"python", "stepcell", "onnxruntime", "torch", "numpy"} == set(found["versions"]) - {"openvino"}
    (shape,) = found["shapes"]
    assert shape["threads"] == 1
    assert shape["frame"] == [16, 5, 8, 8]
    assert list(shape["loops"]) == [*loop.LOOPS, loop.FLOOR]
    missing = {"OpenVINO, float32", "OpenVINO, bfloat16"} if "openvino" not in found["versions"] else set()
    for name, timed in shape["loops"].items():
        if name in missing:
            assert timed == {"not_run": "OpenVINO is not installed"}
        elif name == "torch.compile":
            assert timed == {"not_run": "left out by --quick"}
        else:
            if name != loop.FLOOR:
                most = loop.TOLERANCES.get(name, 1e-5)  # float32 is not float64, and near it
                assert 0 < timed["error"] < most, (name, timed["error"])
            assert len(timed["milliseconds"]) == shape["rounds"] == 2
            assert all(math.isfinite(ms) and ms > 0 for ms in timed["milliseconds"]), name
    printed = capsys.readouterr().out
    assert printed == loop.table(found)
    ET.parse(output.with_suffix(".svg"))

    # the same table again, from the file, and into a document
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- written by benchmarks/loop.py -->\nold\n<!-- end -->\nafter\n")
    assert script("loop", "--table", output, "--document", document).main() == 0
    assert capsys.readouterr().out == printed
    text = document.read_text()
    assert printed in text
    assert "(new/loop.svg)" in text
    assert "old" not in text
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")


def test_a_loop_that_computes_something_else_is_refused(
    script: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = script("loop")
    no_file = Path("absent.onnx")
    case = loop.Case(CellStack([ConvGRUCell(2, 3)]).eval(), no_file, no_file, ((1, 2, 4, 5),), 1)

    def forgetful(case: Any) -> Any:
        return lambda x: loop.LOOPS["torch eager"](case)(x)  # a state that is never kept

    names = ("torch eager", "torch eager, channels last", "torch, six convolutions", "torch, three convolutions")
    monkeypatch.setattr(loop, "LOOPS", {name: loop.LOOPS[name] for name in names})
    assert list(loop.checked_loops(case)[0]) == list(names)
    loop.LOOPS["forgetful"] = forgetful
    with pytest.raises(ParityError, match=r"forgetful: expected outputs within 0\.0001 of float64") as refusal:
        loop.checked_loops(case)
    assert refusal.value.exit_code == 3


def test_the_floor_has_as_many_operations_as_the_convolutions(script: Callable[..., ModuleType]) -> None:
    loop = script("loop")
    case = loop.Case(CellStack([ConvGRUCell(5, 32)]).eval(), Path("absent"), Path("absent"), ((16, 5, 8, 8),), 1)
    convolutions = 2 * 16 * 8 * 8 * 9 * (5 * 96 + 32 * 64 + 32 * 32)
    product = 2 * loop.matrix_product(case)(None).size * 512
    assert abs(product / convolutions - 1) < 0.01, f"{product} against {convolutions}"


def test_nan_is_an_error(script: Callable[..., ModuleType]) -> None:
    loop = script("loop").InProcess(lambda x: x * np.nan, ((1,),))
    assert math.isnan(loop.error(np.zeros((2, 1), np.float32)))


def test_ratios_are_taken_within_rounds(script: Callable[..., ModuleType]) -> None:
    lines = script("loop_report").table(result(**SMALL)).splitlines()
    assert lines[0].startswith("| one thread: per step")
    assert lines[2] == "| **StepLoop** | 2 ms; 0.50 (0.50 to 0.75) |"
    assert lines[4] == "| session.run | 4 ms; 1 |"
    assert lines[7] == "| torch.compile | not run: no compiler |"
    assert "| StepLoop as `session.run` | 2.00 (1.50 to 2.00) |" in lines
    assert "| StepLoop, check_finite=False as `session.run` | 2.00 (1.50 to 3.00) |" in lines
    # channels last has the better median, for all its slow third round
    assert "| StepLoop as torch eager in its better layout | 6.00 (4.50 to 6.00) |" in lines
    assert "| StepLoop as a matrix product of as many operations | 0.25 (0.15 to 0.38) |" in lines


def test_the_picture_has_a_bar_for_each_loop_that_ran(script: Callable[..., ModuleType]) -> None:
    picture = ET.fromstring(script("loop_report").svg(result(**SMALL)))
    bars = picture.findall("{http://www.w3.org/2000/svg}rect")[1:]
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert len(bars) == 6
    assert widths[0] == pytest.approx(widths[2] / 2, abs=0.1)
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "not run" in texts
    assert "a < b" in texts


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rounds", 1], 2, "at least 2 rounds"),
        (["--table", "absent.json"], 1, "absent.json: cannot be read"),
        (["--table", ROOT / "pyproject.toml"], 1, "expected a result of benchmarks/loop.py"),
    ],
)
def test_bad_requests_are_explained(
    script: Callable[..., ModuleType],
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    code: int,
    message: str,
) -> None:
    assert script("loop", *arguments).main() == code
    assert message in capsys.readouterr().err


def test_a_document_without_marks_is_refused(script: Callable[..., ModuleType]) -> None:
    with pytest.raises(InputError, match="expected one `<!-- written by"):
        script("loop_report").with_block("no marks", "table")


def test_the_document_shows_the_committed_result(script: Callable[..., ModuleType]) -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    if RESULT.exists():
        assert script("loop_report").table(json.loads(RESULT.read_text())) in text
    else:
        assert "Not measured on a quiet machine yet." in text


@pytest.mark.slow
def test_overhead_quick(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    overhead = script("overhead", "--steps", 2, "--output", tmp_path / "overhead.json")
    overhead.WARM_UP = 2
    overhead.main()
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert found["steps"] == 2
    assert set(found["results"]) == {
        "step",
        "step_slots, all",
        "step_slots, one idle",
        "step_slots, half idle",
    }
    for name, figures in found["results"].items():
        assert figures["bare_us"] > 0, name
        assert figures["loop_us"] - figures["bare_us"] == pytest.approx(figures["overhead_us"], abs=0.2), name


@pytest.mark.slow
def test_pixels_quick(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    pixels = script("pixels", "--quick", "--rounds", 2, "--output", tmp_path / "pixels.json")
    pixels.main()
    found = json.loads((tmp_path / "pixels.json").read_text())
    assert found["bytes"]["float"] == {"in": 54 * 96 * 3 * 4, "out": 54 * 96 * 3 * 4}
    assert found["bytes"]["uint8"] == {"in": 54 * 96 * 3, "out": 54 * 96 * 3 + 4}
    assert {len(each) for form in found["milliseconds"].values() for each in form.values()} == {2}
    plot = (tmp_path / "pixels.svg").read_text()
    assert plot.count("<rect") == 1 + len(pixels.rows(found))


@pytest.mark.slow
def test_evaluator_quick(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    evaluator = script("evaluator", "--quick", "--steps", 2, "--output", tmp_path / "evaluator.json")
    evaluator.main()
    found = json.loads((tmp_path / "evaluator.json").read_text())
    both = found["against_onnx_reference"]
    assert both["times_as_fast"][1] > 1
    assert both["max_difference_of_y"] < 5e-3
    assert set(found["alone"]) == {
        "size",
        "as_written_s_per_1000",
        "float32_s_per_1000",
        "float64_s_per_1000",
        "jvp_s_per_1000",
    }


def test_map_draws_its_rounds(script: Callable[..., ModuleType], tmp_path: Path) -> None:
    """Clips of the size that is asked for, the digest of what they become, bars up to the fastest round."""
    benchmark = script("map")
    assert benchmark.write_clips(tmp_path / "clips", 2, 3) == (176, 144)
    whole = benchmark.digest(tmp_path / "clips")
    (tmp_path / "clips/00.mp4").write_bytes(b"")
    assert benchmark.digest(tmp_path / "clips") != whole
    factors = {command: [1.0, 1.0] for command in benchmark.COMMANDS} | {benchmark.TWO_WORKERS: [2.0, 4.0]}
    rest = {"clips": 40, "frames": 960, "size": (176, 144), "cpu": "<CPU>", "cores": 2, "load_before": (0.5, 0, 0)}
    picture = ET.fromstring(benchmark.svg({"times as fast": factors, **rest}))
    texts = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[-2:] == ["map, 2 workers", "3.00"]
    assert "<CPU>, 2 cores" in str(texts[1])
    widths = [float(each.get("width", "")) for each in list(picture.iter("{http://www.w3.org/2000/svg}rect"))[1:]]
    assert widths[-1] == pytest.approx(3 * widths[0], abs=0.2)


@pytest.mark.slow
def test_pipeline_quick(script: Callable[..., ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This version against itself."""
    output = tmp_path / "pipeline.json"
    assert script("pipeline", "--quick", "--other", ROOT, "--output", output).main() == 0
    found = json.loads(output.read_text())
    assert [(case["input"], case["output"]) for case in found["cases"]][1] == ("clip.mp4", "out.npy")
    assert all(each["fps"] > 0 for case in found["cases"] for each in case["this version"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found["cases"]) == 11
    texts = [each.text for each in ET.parse(output.with_suffix(".svg")).iter("{http://www.w3.org/2000/svg}text")]
    assert "clip.npy to nothing" in texts


def test_ncnn_result_has_a_table_and_a_picture(script: Callable[..., ModuleType]) -> None:
    module = script("ncnn_step")
    found = {
        "shapes": [{"name": "a < b", "times_as_fast": [1.1, 1.52, 1.9], "auto": "ncnn 1, CPU"}],
        "errors": [{"model": "cell", "steps": 7, "worst_rms": {"onnxruntime": 1e-8, "ncnn": 2e-8}, "ratio": 2.0}],
        "idle": {"share_of_2_in_8": {"onnxruntime": [0.9, 1.0, 1.1], "ncnn": [0.2, 0.26, 0.3]}},
        "cpu": "CPU", "cores": 2, "threads": 1, "load_before": [0.1] * 3, "load_after": [0.2] * 3,
    }  # fmt: skip
    text = module.table(found)
    assert "| a < b | 1.52 (1.10 to 1.90) | ncnn 1 |" in text
    assert "| cell, 7 steps | 1.0e-08 | 2.0e-08 | 2.00 |" in text
    assert "2 frames takes 0.26 of one with 8 in ncnn, 1.00 in ONNX Runtime" in text
    bars = ET.fromstring(module.svg(found)).findall(".//{*}rect")
    assert [bar.get("width") for bar in bars] == ["100%", f"{1.52 * 180:.1f}"]


def test_quartiles_of_rounds(script: Callable[..., ModuleType]) -> None:
    module = script("ncnn_step")
    calls = {"one": 0, "two": 0}

    def step(name: str) -> None:
        calls[name] += 1

    times = module.rounds_of({name: lambda name=name: step(name) for name in calls}, 3)
    assert [len(found) for found in times.values()] == [3, 3]
    assert min(calls.values()) >= 3 * 3
    assert module.quartiles([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]
