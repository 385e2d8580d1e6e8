"""Exported files: graph, contract, numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from stepcell.contract import METADATA_KEY, StateSpec, StepContract, TensorSpec
from stepcell.errors import ExportError, OutputError, ParityError, UsageError
from stepcell.exporter import export_onnx
from stepcell.models import CellStack, ConvGRUCell, ConvLSTMCell, DenseStack, GRUCell, LSTMCell, run_sequence
from stepcell.models.zoo.denoiser import Denoiser

MODELS = {
    "before": lambda: CellStack([ConvGRUCell(3, 6, 3), ConvGRUCell(6, 4, (1, 5))]),
    "after": lambda: CellStack([ConvGRUCell(3, 5, 3, reset="after")]),
    "hard": lambda: CellStack([ConvGRUCell(3, 5, 5, gates="hard")]),
    "lstm": lambda: CellStack([ConvLSTMCell(3, 5, 3), ConvLSTMCell(5, 4, 1)]),
    "peephole-hard": lambda: CellStack([ConvLSTMCell(3, 5, 3, peephole="channel", gates="hard")]),
    "dense-gru": lambda: DenseStack([GRUCell(7, 5), GRUCell(5, 4)]),
    "dense-lstm": lambda: DenseStack([LSTMCell(7, 5)]),
    "mixed": lambda: CellStack([ConvGRUCell(3, 4), ConvGRUCell(4, 4, reset="after"), ConvGRUCell(4, 4)]),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> CellStack:
    torch.manual_seed(0)
    stack = MODELS[request.param]()
    with torch.no_grad():
        for parameter in stack.parameters():
            if request.param != "peephole-hard":  # there a forget gate clamped at 1 would sum up every rounding
                parameter.mul_(2)  # away from the linear part of the gates
    return stack


def stepped_by_the_metadata_alone(path: Path, frames: np.ndarray) -> dict[str, np.ndarray]:
    """What a reader without stepcell does: onnxruntime and the JSON in the file, nothing else."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    contract = json.loads(session.get_modelmeta().custom_metadata_map["stepcell.contract"])
    (x,), states = contract["inputs"], contract["states"]
    sizes = dict(zip(x["shape"], frames.shape[1:], strict=True))
    feeds = {
        state["input"]: np.zeros(
            [d if isinstance(d, int) else eval(d, {}, sizes) for d in state["shape"]], state["dtype"]
        )
        for state in states
    }
    names = [*(output["name"] for output in contract["outputs"]), *(state["output"] for state in states)]
    collected: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for frame in frames:
        results = dict(zip(names, session.run(names, {x["name"]: frame.astype(x["dtype"]), **feeds}), strict=True))
        feeds = {state["input"]: results[state["output"]] for state in states}
        for name, value in results.items():
            collected[name].append(value.astype(np.float64))
    return {name: np.stack(values) for name, values in collected.items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("float16", 1e-2)])
def test_a_reader_of_the_metadata_gets_what_torch_computes_over_100_steps(
    model: CellStack, precision: str, tolerance: float, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(model, path, precision=precision)  # type: ignore[arg-type]
    shape = [2, model.inputs[0].shape[1], *([9, 13] if len(model.inputs[0].shape) == 4 else [])]
    frames = np.random.default_rng(0).uniform(-1, 1, (100, *shape)).astype(np.float16)
    got = stepped_by_the_metadata_alone(path, frames)
    with torch.no_grad():
        expected, final = run_sequence(model.double(), torch.from_numpy(frames).double())
    error = np.abs(got["y"] - expected.numpy()).max()
    print(f"{precision}: worst error over 100 steps {error:.2e}")
    assert error < tolerance
    for state, value in zip(model.states, final, strict=True):
        assert np.abs(got[state.output][-1] - value.numpy()).max() < tolerance


def test_graph_holds_ops_with_their_definition_and_no_loop(model: CellStack, tmp_path: Path) -> None:
    contract = export_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    ops = [node.op_type for node in proto.graph.node if node.domain == "stepcell"]
    assert set(ops) <= {"ConvGRU", "ConvLSTM"}
    assert len(ops) == sum(cell.op is not None for cell in contract.cells) > 0
    assert sorted(f.name for f in proto.functions) == sorted(set(ops)), "each op once, under its own name"
    assert not {node.op_type for node in proto.graph.node} & {"Loop", "Scan", "GRU", "LSTM", "RNN"}
    assert [value.name for value in proto.graph.input] == list(contract.graph_inputs)
    assert [value.name for value in proto.graph.output] == list(contract.graph_outputs)
    assert "/" not in proto.SerializeToString().decode("latin1").partition("site-packages")[1], (
        "no paths of this machine"
    )


def test_second_variant_of_an_op_becomes_ordinary_nodes(tmp_path: Path) -> None:
    contract = export_onnx(MODELS["mixed"](), tmp_path / "model.onnx")
    assert [cell.op for cell in contract.cells] == ["stepcell::ConvGRU", None, "stepcell::ConvGRU"]


def test_contract_of_the_denoiser(denoiser_onnx: Path) -> None:
    proto = onnx.load(denoiser_onnx)
    text = next(item.value for item in proto.metadata_props if item.key == METADATA_KEY)
    contract = StepContract.from_json(text)
    assert contract.precision == "float16"
    assert [(s.name, s.dtype, s.shape) for s in contract.states] == [
        ("h", "float32", ("batch", 8, "height // 2", "width // 2"))
    ]
    assert contract.inputs[0].dtype == contract.outputs[0].dtype == "float16"
    assert contract.parity is not None
    assert set(contract.parity.max_abs_error) == {"y", "h"}
    raw = json.loads(text)
    assert raw["states"][0]["input"] == "state_in.h"
    assert raw["states"][0]["output"] == "state_out.h"


def test_shape_fixes_and_dynamic_frees(denoiser: Denoiser, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(denoiser, path, shapes={"x": (1, 3, 64, 96)})
    assert [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 96]
    contract = export_onnx(denoiser, path, shapes={"x": (1, 3, 64, 96)}, dynamic=["batch"])
    assert contract.inputs[0].shape == ("batch", 3, 64, 96)
    assert contract.states[0].shape == ("batch", 8, 32, 48)


def test_exporting_twice_gives_the_same_bytes(denoiser: Denoiser, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        export_onnx(denoiser, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(denoiser: Denoiser, opset: int, tmp_path: Path) -> None:
    assert export_onnx(denoiser, tmp_path / "m.onnx", opset=opset).source["opset"] == opset


def test_float16_state_is_written_where_asked(denoiser: Denoiser, tmp_path: Path) -> None:
    contract = export_onnx(denoiser, tmp_path / "m.onnx", state_dtype="float16")
    assert contract.states[0].dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"opset": 17}, UsageError, "expected 18 to 23, got 17"),
        ({"shapes": {"frame": (1, 3, 64, 64)}}, UsageError, "no such input"),
        ({"dynamic": ["time"]}, UsageError, "no such symbol"),
        (
            {"shapes": {"x": (1, 1, 64, 64)}},
            Exception,
            r"expected shape \(batch, 3, height, width\), got \(1, 1, 64, 64\)",
        ),
        ({"shapes": {"x": (1, 3, 63, 64)}}, Exception, "multiples of 2"),
    ],
)
def test_bad_arguments(denoiser: Denoiser, arguments: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export_onnx(denoiser, tmp_path / "m.onnx", **arguments)
    assert not list(tmp_path.iterdir())


class _Step(nn.Module):
    """A one-state model whose forward the test supplies."""

    def __init__(self, body) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.inputs = [TensorSpec(name="x", shape=("batch", 4))]
        self.outputs = [TensorSpec(name="y", shape=("batch", 4))]
        self.states = [StateSpec(name="h", shape=("batch", 4))]
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return self.body(self, x, h)  # type: ignore[no-any-return]


def _good(self: _Step, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    new = 0.9 * h + torch.tanh(self.linear(x)).to(h.dtype)
    return new.to(x.dtype), new


def _one_result(self: _Step, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (x,)


def _wrong_dtype(self: _Step, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return x, self.linear(h.to(x.dtype))


def _unwired(self: _Step, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    new = torch.tanh(self.linear(x))
    return new, new.to(h.dtype) + 0 * h


def _branching(self: _Step, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (x, h) if x.sum() > 0 else (self.linear(x), -h)


def test_any_module_with_the_protocol_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    contract = export_onnx(_Step(_good), tmp_path / "m.onnx")
    assert contract.cells == ()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_one_result, "expected a tuple of 2"),
        (_wrong_dtype, "expected .* torch.float32, got .* torch.float16"),
        (_unwired, "state h: changes no output"),
        (_branching, "tracing failed"),
    ],
)
def test_modules_that_are_no_steps_are_refused(body: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(_Step(body), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_not_a_step_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Linear: not a step model"):
        export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = _Step(_good)
    with torch.no_grad():
        model.linear.weight[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"linear.weight: holds 1e\+06"):
        export_onnx(model, tmp_path / "m.onnx")


def test_a_wrong_file_is_caught_and_nothing_is_left(
    denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break the op's definition on purpose: the check after export must see it."""
    from stepcell.exporter.step_onnx import op_functions as functions

    monkeypatch.setattr(functions, "_BLEND", functions._BLEND.replace("Sub(n, h_wide)", "Sub(h_wide, n)"))
    kept = tmp_path / "model.onnx"
    kept.write_text("the user's older file")
    with pytest.raises(ParityError, match="differs from torch float64"):
        export_onnx(denoiser, kept, overwrite=True)
    assert kept.read_text() == "the user's older file"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_unwritable_output(denoiser: Denoiser, tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "m.onnx", tmp_path):
        with pytest.raises(OutputError):
            export_onnx(denoiser, path)
