"""Files that take and return bytes or labels: all 256 levels are compared, and one level of rounding is no mismatch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepcell import fuse
from stepcell.errors import ExportError, ParityError
from stepcell.exporter.from_onnx import check
from stepcell.exporter.onnx_session import OnnxSession


def byte_file(path: Path, *, labels: bool = False, extra: tuple[onnx.NodeProto, ...] = ()) -> Path:
    """h' = 0.9 h + 0.1 frame / 255, and from it bytes or labels; frames (batch, height, width, 3) uint8."""
    sizes = ["batch", "height", "width"]
    last = (
        [helper.make_node("ArgMax", ["h_out"], ["pic"], axis=3, keepdims=0)]
        if labels
        else [helper.make_node("Mul", ["h_out", "scale"], ["wide"]), helper.make_node("Cast", ["wide"], ["pic"], to=2)]
    )
    nodes = [
        helper.make_node("Cast", ["frame"], ["float"], to=1),
        helper.make_node("Div", ["float", "scale"], ["unit"]),
        helper.make_node("Mul", ["h_in", "keep"], ["kept"]),
        helper.make_node("Mul", ["unit", "take"], ["taken"]),
        helper.make_node("Add", ["kept", "taken"], ["h_out"]),
        *last,
        *extra,
    ]
    numbers = {"scale": 255.0, "keep": 0.9, "take": 0.1}
    dtype, shape = (TensorProto.INT64, sizes) if labels else (TensorProto.UINT8, [*sizes, 3])
    graph = helper.make_graph(
        nodes,
        "bytes",
        [
            helper.make_tensor_value_info("frame", TensorProto.UINT8, [*sizes, 3]),
            helper.make_tensor_value_info("h_in", TensorProto.FLOAT, [*sizes, 3]),
        ],
        [
            helper.make_tensor_value_info("pic", dtype, shape),
            helper.make_tensor_value_info("h_out", TensorProto.FLOAT, [*sizes, 3]),
        ],
        [numpy_helper.from_array(np.float32(value), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


class Spy(OnnxSession):
    """The fused file, whose bytes are off by `levels` in the first elements."""

    levels, count = 0, 0
    seen: set[int]

    def __call__(self, feeds):  # type: ignore[no-untyped-def]
        Spy.seen |= set(np.unique(feeds["frame"]).tolist())
        results = super().__call__(feeds)
        if "state_in.h" in feeds and "pic" in results:
            changed = results["pic"].copy()
            changed.flat[: self.count] = np.where(changed.flat[: self.count] > 100, -self.levels, self.levels) + (
                changed.flat[: self.count].astype(int)
            )
            results["pic"] = changed
        return results


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    Spy.seen, Spy.levels, Spy.count = set(), 0, 0
    monkeypatch.setattr("stepcell.exporter.from_onnx.fuse.OnnxSession", Spy)
    return Spy


def test_bytes_are_compared_at_all_levels(tmp_path: Path) -> None:
    contract = fuse(byte_file(tmp_path / "a.onnx"), tmp_path / "b.onnx").contract
    assert Spy.seen == set(range(256))
    (frame,), (pic,) = contract.inputs, contract.outputs
    assert [(each.layout, each.range, each.channels) for each in (frame, pic)] == [("NHWC", (0, 255), "RGB")] * 2
    assert contract.symbols == ["batch", "height", "width"]


@pytest.mark.parametrize(("levels", "count", "passes"), [(1, 10**6, True), (2, 10**6, False), (2, 40, False)])
def test_one_level_of_rounding_is_no_mismatch(tmp_path: Path, levels: int, count: int, passes: bool) -> None:
    Spy.levels, Spy.count = levels, count
    source, target = byte_file(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    if not passes:
        with pytest.raises(ParityError, match="of its elements by more than 1, the limit is"):
            fuse(source, target)
        assert not target.exists()
        return
    parity = fuse(source, target).contract.parity
    assert parity is not None
    assert (parity.max_abs_error["pic"], parity.differing["pic"]) == (1, 1)


@pytest.mark.parametrize(("count", "passes"), [(1, True), (200, False)])
def test_of_labels_a_few_may_differ(tmp_path: Path, count: int, passes: bool) -> None:
    Spy.levels, Spy.count = 1, count
    source, target = byte_file(tmp_path / "a.onnx", labels=True), tmp_path / "b.onnx"
    if not passes:
        with pytest.raises(ParityError, match="of its elements, the limit is"):
            fuse(source, target)
        return
    contract = fuse(source, target).contract
    assert contract.outputs[0].layout == "NHW"
    assert contract.parity is not None
    assert 0 < contract.parity.differing["pic"] < 0.01


def test_an_index_that_is_too_large_says_how_to_declare_it(tmp_path: Path) -> None:
    path = byte_file(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("kind", TensorProto.UINT8, ["batch", 2]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5, np.float32), "table"))
    model.graph.node.insert(0, helper.make_node("Cast", ["kind"], ["index"], to=7))
    model.graph.node.insert(1, helper.make_node("Gather", ["table", "index"], ["looked_up"]))
    model.graph.node.insert(2, helper.make_node("ReduceSum", ["looked_up"], ["added"], keepdims=0))
    add = next(node for node in model.graph.node if node.output[0] == "unit")
    add.output[0] = "plain"
    model.graph.node.insert(5, helper.make_node("Add", ["plain", "added"], ["unit"]))
    onnx.save(model, path)
    from stepcell import Pixels

    with pytest.raises(ExportError, match="indices element out of data bounds") as caught:
        fuse(path, tmp_path / "b.onnx")
    assert "--range kind:LOW,HIGH" in str(caught.value.hint)
    contract = fuse(path, tmp_path / "b.onnx", pixels={"kind": Pixels(range=(0, 4))}).contract
    assert contract.inputs[1].range == (0, 4)
    assert check.STEPS == 100
