"""The parts of benchmarks/kernels.py that need no GPU: arithmetic of every contender, result, table, plot, verdicts.

Only times are made up: kernels run in Triton's interpreter, exported files in ONNX Runtime on the CPU, and TensorRT-RTX
builds its engine, which it then cannot load.
"""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from stepcell.plugins.kernels.tiles import Tile

FOLDER = Path(__file__).parents[2] / "benchmarks"
KINDS = {
    "before": ["gru_x16_h24_k3x1"],
    "in turn": ["gru_x16_h16_k1x5", "gru_x16_h16_k5x1"],
    "after": ["gru-after_x16_h16_k3x3"],
    "lstm": ["lstm_x8_h16_k3x3"],
}
CAPABILITY = "9.0"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The benchmark's modules, with pointwise kernels that Triton interprets; removed from sys.modules afterwards."""
    sys.path.insert(0, str(FOLDER))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        names = [path.stem for path in FOLDER.glob("kernel*.py")]
        modules = {name: importlib.import_module(name) for name in names}
        yield SimpleNamespace(**modules)
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)


def tiny(benchmark: Any, kind: str) -> Any:
    case = benchmark.kernel_cases._case("S1 small", 2, 5, 7, *KINDS[kind])
    return benchmark.kernel_cases.make_problem(case, "cpu")


def times(isolated: float, chain: float | None = None) -> dict[str, Any]:
    """Medians as a clock would give them."""
    ways = {"isolated": isolated, "chain": isolated if chain is None else chain}
    return {way: {"median": value, "p10": value - 1, "p90": value + 1} for way, value in ways.items()}


def contender(role: str, isolated: float, chain: float | None = None) -> dict[str, Any]:
    return {"role": role, "microseconds": times(isolated, chain), "error": 0.0, "notes": []}


@pytest.mark.parametrize("kind", KINDS)
def test_every_contender_computes_the_step(benchmark: Any, steps: Any, kind: str) -> None:
    kernels, problem = benchmark.kernels, tiny(benchmark, kind)
    everyone = {
        **kernels.our_contenders(problem, CAPABILITY, steps.launch, []),
        **kernels.torch_contenders(problem),
    }
    if kind in ("in turn", "lstm"):  # an export takes a second
        everyone["ONNX Runtime"] = ("peer", lambda: benchmark.kernel_engines.onnx_runtime(problem))
    del everyone["torch.compile max-autotune"]  # half a minute
    found = kernels.run_contenders(problem, everyone, lambda _: times(30.0))
    assert not [(name, each["not_run"]) for name, each in found.items() if "not_run" in each]
    whole = {name: each["error"] for name, each in found.items() if each["role"] != "bound"}
    assert len(whole) == {"before": 7, "in turn": 8, "after": 4, "lstm": 5}[kind]
    assert max(whole.values()) < kernels.TOLERANCE, whole
    moved = min(float((new - old).abs().max()) for new, old in zip(problem.exact, problem.states, strict=True))
    assert moved > 0.1  # the step does something


def test_a_wrong_contender_is_not_timed(benchmark: Any) -> None:
    problem = tiny(benchmark, "before")
    exact = tuple(state + 0.01 for state in problem.exact)
    wrong = benchmark.kernel_timing.runs_of(lambda _, states: states, problem.xs, exact)
    found = benchmark.kernels.run_contenders(problem, {"wrong": ("peer", lambda: wrong)}, lambda _: times(1.0))
    assert found == {"wrong": {"role": "peer", "not_run": "wrong: differs from float64 by 1.0e-02"}}


def test_a_chain_feeds_every_step_the_state_of_the_one_before(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, seen = benchmark.kernel_timing, []
    monkeypatch.setattr(timing, "captured", lambda run: SimpleNamespace(replay=run))
    runs = timing.runs_of(lambda x, states: seen.append((x, states[0])) or (states[0] + 1,), (5, 6, 7, 8), (0,))
    runs.chain()
    assert seen == [(5 + i % 4, i) for i in range(timing.CHAIN)]
    seen.clear()
    runs.isolated()
    runs.isolated()
    assert seen == [(5, 0), (5, 0)]


def test_work_bytes_and_floors_of_the_cases(benchmark: Any) -> None:
    cases = {case.name: case for case in benchmark.kernel_cases.CASES}
    expected = {
        "S1 small": (1.359, 1.642),
        "S2 medium": (7.248, 6.734),
        "S3 RAFT": (13.84, 7.373),
        "S4 four streams": (28.99, 25.61),
        "S5 matting": (14.33, 49.79),
        "S6 events": (2.123, 7.539),
        "S2 reset after": (7.248, 6.734),
        "S2 LSTM": (9.664, 11.08),
    }
    for name, (gigaflop, megabyte) in expected.items():
        assert cases[name].flops / 1e9 == pytest.approx(gigaflop, rel=1e-3), name
        assert cases[name].nbytes / 1e6 == pytest.approx(megabyte, rel=1e-3), name
    floor = cases["S5 matting"].floor(bytes_per_second=1e12, flop_per_second=1e15)
    assert floor == pytest.approx({"compute": 14.33, "memory": 49.79, "floor": 49.79}, rel=1e-3)


def test_tiles_are_timed_one_by_one_and_the_fastest_is_taken(benchmark: Any, steps: Any) -> None:
    """A clock that likes the last tile best; one tile does not fit."""
    ours, problem, count = benchmark.kernel_ours, tiny(benchmark, "in turn"), iter(range(100, 0, -1))

    def clock(run: Callable[[], None]) -> dict[str, float]:
        run()
        if (now := next(count)) == 100:
            raise RuntimeError("out of shared memory\nmore")
        return {"median": float(now)}

    rows = ours.tile_times(problem, "float32", CAPABILITY, steps.launch, clock=clock)
    assert [(row["kernel"], row["cell"]) for row in rows if row["default"]] == [
        (kernel, f"gru_x16_h16_k{size}_soft_float32")
        for size in ("1x5", "5x1")
        for kernel in ("gru_gates", "gru_candidate")
    ]
    assert [row["not_run"] for row in rows if "not_run" in row] == ["out of shared memory"]
    chosen = ours.defaults(problem, "float32", CAPABILITY)
    cells = [cell.with_state("float32") for cell in problem.case.cells]
    best = ours.fastest(rows, chosen, cells)
    for cell, before, after in zip(cells, chosen, best, strict=True):
        for kernel in before:
            last = [r["tile"] for r in rows if (r["kernel"], r["cell"]) == (kernel, cell.label)][-1]
            assert after[kernel].label == last != before[kernel].label
    assert not [row for row in rows if row["kernel"] == "gru_candidate" and row["tile"].endswith("p")]
    names = benchmark.kernels.our_contenders(problem, CAPABILITY, steps.launch, rows)
    assert "stepcell, float16 state, overlapping launches" in names
    older = benchmark.kernels.our_contenders(problem, "8.7", steps.launch, [])
    assert list(older) == ["stepcell, float16 state", "stepcell, float32 state"]
    assert "stepcell, float32 state, fastest tiles" in names
    assert "stepcell, float16 state, fastest tiles" not in names  # not timed


def test_more_tiles_are_tried_on_request(benchmark: Any) -> None:
    cell = benchmark.kernel_cases.CASES[1].cells[0]
    some, more = (
        benchmark.kernel_ours._tiles_to_time("gru_gates", cell, CAPABILITY, 16384, tune=tune) for tune in (False, True)
    )
    assert more[: len(some)] == some
    assert len(more) == len(set(more)) > 30
    assert {tile.warps for tile in more} == {4}
    assert all(Tile.from_label(tile.label) == tile for tile in more)


def test_runtimes_that_are_missing_are_listed_with_the_reason(benchmark: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    problem = tiny(benchmark, "before")
    everyone = {
        name: each
        for name, each in benchmark.kernels.runtime_contenders(problem, tmp_path).items()
        if "float16" in name
    }
    found = benchmark.kernels.run_contenders(problem, everyone, lambda _: times(1.0))
    print(json.dumps(found, indent=1))
    assert {name: each["role"] for name, each in found.items()} == {
        "TensorRT-RTX, float16 state": "peer",
        "TensorRT, float16 state": "peer",
        "stepcell in TensorRT, float16 state": "hosted",
    }
    assert all("not_run" in each for each in found.values())
    assert "does not load its engine" in found["TensorRT-RTX, float16 state"]["not_run"]


@pytest.fixture
def result(benchmark: Any) -> Any:
    """Three cases with times by hand: a launch-bound one, one with a long floor, one where we did not run."""
    limits = {"bytes_per_second": 3e12, "flop_per_second": 8e14}
    problems = [
        SimpleNamespace(case=next(case for case in benchmark.kernel_cases.CASES if case.name == name))
        for name in ("S1 small", "S5 matting", "S2 LSTM")
    ]
    contenders = [
        {
            "stepcell, float16 state": contender("ours", 8.0, 5.0),
            "stepcell, float16 state, fastest tiles": contender("ours", 6.0, 5.0),
            "stepcell, float32 state": contender("ours", 9.0, 8.0),
            "torch": contender("peer", 30.0, 29.0),
            "cuDNN, a | b": contender("peer", 15.0, 12.0),
            "cuDNN convolutions alone": contender("bound", 4.0),
            "TensorRT": {"role": "peer", "not_run": "TensorRT is not installed"},
            "stepcell in TensorRT": contender("hosted", 3.0),
        },
        {
            "stepcell, float16 state": contender("ours", 30.0, 40.0),
            "stepcell, float32 state": contender("ours", 50.0),
            "torch": contender("peer", 45.0),
            "TensorRT-RTX, float16 state": {"role": "peer", "not_run": "no such GPU"},
        },
        {
            "stepcell, float16 state": {"role": "ours", "not_run": "no kernel"},
            "torch": contender("peer", 45.0),
        },
    ]
    row = {"kernel": "gru_gates", "cell": "c", "pixels": 9, "tile": "64x64x64s4w4", "default": True}
    rows = [
        {**row, "microseconds": {"median": 4.0}},
        {**row, "tile": "128x64x32s3w4", "default": False, "microseconds": {"median": 3.0}},
        {**row, "tile": "64x32x64s4w4", "default": False, "not_run": "does not fit"},
    ]
    cases = [
        benchmark.kernels.case_result(problem, limits, found, own)
        for problem, found, own in zip(problems, contenders, (rows, [], []), strict=True)
    ]
    made = {"device": "GPU & more", "capability": "9.0", "versions": {"torch": "2"}, "ceilings": limits, "cases": cases}
    return json.loads(json.dumps(made))


def test_targets_are_judged_by_the_worse_way_of_timing(benchmark: Any, result: Any) -> None:
    found = {
        (v.case, v.state, v.target.split()[0]): (None if v.value is None else round(v.value, 2), v.met)
        for v in benchmark.kernel_report.verdicts(result)
    }
    assert found == {
        ("S1 small", "float16", "faster"): (2.4, True),  # chain: 12 / 5; isolated with the fastest tiles: 15 / 6
        ("S1 small", "float16", "1.5"): (2.4, True),
        ("S1 small", "float16", "2"): (2.4, True),
        ("S1 small", "float32", "faster"): (1.5, True),  # chain: 12 / 8
        ("S1 small", "float32", "1.5"): (1.5, True),
        ("S1 small", "float32", "2"): (1.5, False),
        ("S5 matting", "float16", "faster"): (1.12, True),
        ("S5 matting", "float16", "1.5"): (1.12, False),
        ("S5 matting", "float16", "within"): (2.23, False),  # chain: 40 / 17.9
        ("S5 matting", "float32", "faster"): (0.9, False),
        ("S5 matting", "float32", "1.5"): (0.9, False),
        ("S5 matting", "float32", "within"): (2.79, False),
        ("S2 LSTM", "float16", "faster"): (None, None),
        ("S2 LSTM", "float16", "within"): (None, None),
    }


def test_the_report_says_what_was_met_missed_and_not_run(benchmark: Any, result: Any) -> None:
    text = benchmark.kernel_report.report(result)
    print(text)
    assert "GPU & more (compute capability 9.0); torch 2." in text
    assert "a copy moves 3.00 TB/s, a matrix product in half does 800 TFLOP/s" in text
    assert (
        "| S1 small | 1.7 | 6.0 / 5.0 | 2.50 / 2.40 | 9.0 / 8.0 | 1.67 / 1.50 | 3.5 / 2.9 "
        "| cuDNN, a \\| b, 15.0 / 12.0 |" in text
    )
    assert (
        "| faster than the strongest baseline, float16 state | met, as far as run | S1 small (2.40), S5 matting (1.12) "
        "|  | S2 LSTM |" in text
    )
    assert (
        "| faster than the strongest baseline, float32 state | missed | S1 small (1.50) | S5 matting (0.90) |  |"
        in text
    )
    assert "| TensorRT | not run |  |  |" in text
    assert "- TensorRT: TensorRT is not installed" in text
    assert "TensorRT-RTX on this device: does not run (no such GPU)." in text
    assert "| S1 small | gru_gates of c | 64x64x64s4w4, 4.0 | 128x64x32s3w4, 3.0 |" in text
    widths = {line.count("|") - line.count("\\|") for block in text.split("\n\n") for line in block.splitlines()[:1]}
    for block in (each for each in text.split("\n\n") if each.startswith("|")):
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1, block
    assert len(widths) > 2


def test_a_saved_result_is_printed_as_a_table(
    benchmark: Any, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--table", str(file)])
    assert benchmark.kernels.main() == 0
    assert capsys.readouterr().out == benchmark.kernel_report.report(result)


def test_without_a_gpu_it_says_so(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "new" / "result.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--output", str(file)])
    assert benchmark.kernels.main() == 0
    assert json.loads(file.read_text()) == {"not_run": "no CUDA device"}
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--table", str(file)])
    assert benchmark.kernels.main() == 0
    assert capsys.readouterr().out == "Not run: no CUDA device.\n"


def test_the_picture_shows_ratios_to_the_floor_and_the_best_peer(benchmark: Any, result: Any) -> None:
    picture = benchmark.kernel_plot.svg(result)
    texts = [element.text for element in ET.fromstring(picture).iter() if element.text and element.text.strip()]
    assert texts[0] == "One step (isolated graph replay), times the floor; GPU & more"
    assert "S1 small (floor 1.7 us)" in texts
    assert "8.0 us, 4.7 x floor, 0.53 x best peer" in texts
    assert texts[texts.index("TensorRT") + 1] == "not run"


def test_a_whole_run_but_for_the_device(
    benchmark: Any, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files named after the device, and the report at the end; a case that cannot be timed does not stop the next."""
    kernels, cases = benchmark.kernels, benchmark.kernel_cases
    small = cases._case("small", 1, 3, 5, *KINDS["after"])
    monkeypatch.setattr(kernels, "CASES", [small, cases._case("other", 1, 1, 1, *KINDS["after"])])
    monkeypatch.setattr(kernels, "make_problem", lambda case, _: cases.make_problem(case, "cpu"))
    monkeypatch.setattr(kernels, "Device", lambda *_: SimpleNamespace(launch=steps.launch))
    monkeypatch.setattr(kernels, "ceilings", lambda: {"bytes_per_second": 3e12, "flop_per_second": 8e14})
    monkeypatch.setattr(kernels, "runtime_contenders", lambda *_: {})
    fewest = "torch, fewest convolutions"
    monkeypatch.setattr(kernels, "torch_contenders", lambda p, made=kernels.torch_contenders: {fewest: made(p)[fewest]})
    monkeypatch.setattr(kernels, "run_contenders", lambda *a, run=kernels.run_contenders: run(*a, lambda _: times(9.0)))
    for name, value in (("is_available", True), ("get_device_capability", (9, 0)), ("get_device_name", "Some GPU (8)")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--cases", "small"])
    monkeypatch.chdir(tmp_path)
    assert kernels.main() == 0
    made = tmp_path / "benchmarks" / "results"
    assert {path.name for path in made.iterdir()} == {"kernels-some-gpu-8.json", "kernels-some-gpu-8.svg"}
    written = json.loads((made / "kernels-some-gpu-8.json").read_text())
    assert capsys.readouterr().out == benchmark.kernel_report.report(written)
    (case,) = written["cases"]
    ran = {name: "microseconds" in each for name, each in case["contenders"].items()}
    assert ran == {"stepcell, float16 state": True, "stepcell, float32 state": True, fewest: True}
    assert all("not_run" in row for row in case["tiles"])  # here the real clock was asked
    assert {row["kernel"] for row in case["tiles"]} == {"gru_after"}
