"""Checkpoints and constructor arguments beyond the recorded cases."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepcell import StepLoop
from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter import FAMILIES, Checkpoint, export_onnx, load_checkpoint, step_model
from stepcell.models import run_sequence
from stepcell.models.unfused_cells import ACTIVATIONS
from tests.golden.cases import KEPT, Case, find_cases

KEPT_CASES = find_cases(places=[KEPT])


def kept(family: str) -> Case:
    return find_cases(family, [KEPT])[0]


def weights(case: Case) -> dict[str, Tensor]:
    return torch.load(case.path / "checkpoint.pth", weights_only=True)  # type: ignore[no-any-return]


def canonical(folder: Path, content: object, family: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    torch.save(content, folder / "c.pth")
    model, _, _ = step_model(load_checkpoint(folder / "c.pth"), family, settings)
    return model.state_dict()


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    worst = {name: float((got[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert max(worst.values()) == 0, f"off by {max(worst.values()):.2g} in {max(worst, key=worst.__getitem__)}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", KEPT_CASES, ids=[case.name for case in KEPT_CASES])
def test_narrow_weights_are_widened_before_they_are_folded(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights(case).items()}
    wide = {name: t.float() if t.is_floating_point() else t for name, t in narrow.items()}
    expected = canonical(tmp_path, wide, case.family, case.settings)
    assert_equal(canonical(tmp_path, narrow, case.family, case.settings), expected)


@pytest.mark.parametrize("case", KEPT_CASES, ids=[case.name for case in KEPT_CASES])
def test_memory_layout_does_not_matter(case: Case, tmp_path: Path) -> None:
    tensors = weights(case)
    strided = {name: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for name, t in tensors.items()}
    expected = canonical(tmp_path, tensors, case.family, case.settings)
    assert_equal(canonical(tmp_path, strided, case.family, case.settings), expected)


@pytest.mark.parametrize("case", KEPT_CASES, ids=[case.name for case in KEPT_CASES])
@pytest.mark.parametrize("name", ["extra.weight", "head.bias"])
def test_a_tensor_of_another_network_is_refused(case: Case, name: str, tmp_path: Path) -> None:
    torch.save({**weights(case), name: torch.zeros(2)}, tmp_path / "c.pth")
    checkpoint = load_checkpoint(tmp_path / "c.pth")
    with pytest.raises(CheckpointError):
        step_model(checkpoint, case.family, case.settings)
    with pytest.raises(CheckpointError):
        step_model(checkpoint)


def test_openeb_cell_with_a_tensor_of_another_network(tmp_path: Path) -> None:
    cell = {"conv_rz": nn.Conv2d(5, 4, 3), "conv_f": nn.Conv2d(5, 2, 3)}
    torch.save({**nn.ModuleDict(cell).state_dict(), "head.bias": torch.zeros(2)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="tensors other than"):
        step_model(load_checkpoint(tmp_path / "c.pth"), "openeb_convrnn")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("jacobkimmel_convgru", "ConvGRUCell_00.out_gate.bias"),
        ("happyjin_convgru", "cell_list.0.conv_can.bias"),
        ("automan000_peephole_convlstm", "cell0.Wcf"),
        ("skillful_convgru", "cell.output_conv.bias"),
        ("openeb_firenet", "conv0.module.conv1.1.weight"),
        ("openeb_firenet", "conv3.conv_x2h.module.1.weight"),
    ],
)
def test_a_missing_tensor_is_refused(family: str, name: str, tmp_path: Path) -> None:
    case = kept(family)
    tensors = weights(case)
    del tensors[name]
    torch.save(tensors, tmp_path / "c.pth")
    with pytest.raises(CheckpointError):
        step_model(load_checkpoint(tmp_path / "c.pth"), family, case.settings)


# A constructor without a bias leaves out these.
OPTIONAL = {
    "ndrplz_convlstm": ["cell_list.0.conv.bias"],
    "openeb_convrnn": ["conv_x2h.module.0.bias"],
}


@pytest.mark.parametrize("case", KEPT_CASES, ids=[case.name for case in KEPT_CASES])
def test_no_missing_bias_counts_as_zero(case: Case) -> None:
    tensors = weights(case)
    for name in [name for name in tensors if "bias" in name and name not in OPTIONAL.get(case.family, ())]:
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        try:
            step_model(Checkpoint(case.path, rest, "", None, {}), case.family, case.settings)
        except CheckpointError:
            continue
        pytest.fail(f"{name} is missing and was taken for zero")


@pytest.mark.parametrize("case", KEPT_CASES, ids=[case.name for case in KEPT_CASES])
def test_a_tensor_with_other_axes_raises_no_other_error(case: Case) -> None:
    tensors = weights(case)
    for name, tensor in tensors.items():
        for other in (tensor.flatten(), torch.zeros(())):
            checkpoint = Checkpoint(case.path, {**tensors, name: other}, "", None, {})
            for family, settings in ((case.family, case.settings), (None, {})):
                with contextlib.suppress(CheckpointError, UsageError):
                    step_model(checkpoint, family, settings)


def wrapped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    both = OrderedDict((f"_orig_mod.module.{name}", tensor) for name, tensor in tensors.items())
    return {
        "a loss beside the weights, two wrappers": {"loss": torch.tensor(0.1), "state_dict": both, "epoch": 3},
        "weights in two wrappings": {"model": {"state_dict": dict(tensors)}},
        "a configuration called model": {"model": {"channels": 5}, **tensors},
        "an empty state_dict": {"state_dict": {}, "params": dict(tensors)},
    }


@pytest.mark.parametrize("what", wrapped({}))
def test_what_training_scripts_write(what: str, tmp_path: Path) -> None:
    case = kept("ndrplz_convlstm")
    expected = canonical(tmp_path, weights(case), case.family, case.settings)
    assert_equal(canonical(tmp_path, wrapped(weights(case))[what], case.family, case.settings), expected)


def test_e2vid_no_skip_concatenates(tmp_path: Path) -> None:
    case = kept("e2vid_recurrent")
    assert case.settings["skip_type"] == "concat"
    # the configuration that E2VID and FireNet share has keys that only FireNet reads
    settings = {**case.settings, "skip_type": "no_skip", "kernel_size": 3, "recurrent_blocks": {"resblock": [0]}}
    models = [step_model(load_checkpoint(case.path / "checkpoint.pth"), case.family, s)[0] for s in (settings, {})]
    x = torch.from_numpy(case.inputs["x"][0])
    with torch.no_grad():
        (got, _), (expected, _) = (run_sequence(model, x) for model in models)  # type: ignore[arg-type]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("blocks", "states"), [({}, 1), ({"resblock": []}, 1), (None, 2), ({"resblock": [-1]}, 3)])
def test_firenet_recurrent_blocks(blocks: object, states: int) -> None:
    model = FAMILIES["e2vid_firenet"].build(num_bins=3, base_num_channels=2, recurrent_blocks=blocks)
    assert len(model.states) == states


@pytest.mark.parametrize("kernel_size", [5, [5, 5]])
def test_gru_rcn_kernel_as_one_number(kernel_size: object, tmp_path: Path) -> None:
    convs = {f"conv{name}": nn.Conv2d(3 if name[0] == "W" else 2, 2, 5, bias=False) for name in WEIGHTS_OF_GRU_RCN}
    tensors = nn.ModuleDict(convs).state_dict()
    settings = {"impl": "Ref_GRU_RCN_Vanilla_Impl", "in_channels": 3, "nb_kernels": 2, "kernel_size": kernel_size}
    got = canonical(tmp_path, tensors, "mangrick_gru_rcn", settings)
    assert torch.equal(got["cells.0.weight_n"], tensors["convUh.weight"])


WEIGHTS_OF_GRU_RCN = ("Wz", "Wr", "Wh", "Uz", "Ur", "Uh")


def test_event_to_video_cell_in_capitals() -> None:
    build = FAMILIES["openeb_event_to_video"].build
    upper, lower = (build(in_channels=2, out_channels=1, num_layers=1, base=2, cell=cell) for cell in ("GRU", "gru"))
    assert [state.name for state in upper.states] == [state.name for state in lower.states]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_openeb_arguments_of_the_input_convolution(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x2h = nn.Conv2d(4, 12, 3, padding=1, groups=2, padding_mode=mode)
    h2h = nn.Conv2d(3, 12, 3, padding=1)
    tensors = {f"conv_x2h.module.0.{name}": tensor for name, tensor in x2h.state_dict().items()}
    tensors |= {f"timepool.conv_h2h.{name}": tensor for name, tensor in h2h.state_dict().items()}
    torch.save(tensors, tmp_path / "c.pth")
    kwargs = {"in_channels": 4, "out_channels": 3, "norm": "none", "groups": 2, "padding_mode": mode}
    settings = {"target": "ConvRNN", "kwargs": kwargs}
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"), "openeb_convrnn", settings)
    x, h, c = torch.randn(6, 2, 4, 5, 7), torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 7)
    with torch.no_grad():
        got, _ = run_sequence(model, x)  # type: ignore[arg-type]
        for step, frame in enumerate(x):
            i, f, o, g = (x2h(frame) + h2h(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            assert (got[step] - h).abs().max() < 1e-6, f"step {step}: off by {(got[step] - h).abs().max():.2g}"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("stride", [1, 2])
def test_openeb_convrnn_with_hard_gates(cell: str, stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lstm = cell == "lstm"
    convs = {"conv_x2h.module.0": nn.Conv2d(2, 12 if lstm else 2, 3, stride, 1)}
    if lstm:
        convs["timepool.conv_h2h"] = nn.Conv2d(3, 12, 3, padding=1)
    else:
        convs |= {"timepool.conv_rz": nn.Conv2d(5, 6, 3, padding=1), "timepool.conv_f": nn.Conv2d(5, 3, 3, padding=1)}
    for conv in convs.values():
        conv.weight.data *= 4  # so that the gates reach their limits
    torch.save(
        {f"{n}.{key}": t for n, conv in convs.items() for key, t in conv.state_dict().items()}, tmp_path / "c.pth"
    )
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"), None, {"hard": True, "stride": stride})
    x2h, *hidden = convs.values()
    x, size = torch.randn(6, 2, 2, 6, 8), (2, 3, 6 // stride, 8 // stride)
    h, c = torch.zeros(size), torch.zeros(size)

    def sigmoid(a: Tensor) -> Tensor:
        return (a / 2 + 0.5).clamp(0, 1)

    with torch.no_grad():
        got, _ = run_sequence(model, x)  # type: ignore[arg-type]
        for step, frame in enumerate(x):
            y = x2h(frame)
            if lstm:
                i, f, o, g = (y + hidden[0](h)).chunk(4, dim=1)
                c = sigmoid(f) * c + sigmoid(i) * g.clamp(-1, 1)
                h = sigmoid(o) * c.clamp(-1, 1)
            else:
                z, r = sigmoid(hidden[0](torch.cat([h, y], dim=1))).chunk(2, dim=1)
                h = (1 - z) * h + z * hidden[1](torch.cat([r * h, y], dim=1)).clamp(-1, 1)
            assert (got[step] - h).abs().max() < 1e-5, f"step {step}: off by {(got[step] - h).abs().max():.2g}"


def test_openeb_names_an_argument_that_upstream_lacks() -> None:
    case = kept("openeb_convrnn")
    settings = {"target": "ConvRNN", "kwargs": {"in_channels": 5, "out_channels": 8, "strides": 2}}
    with pytest.raises(CheckpointError, match="kwargs: ConvRNN takes no strides"):
        step_model(load_checkpoint(case.path / "checkpoint.pth"), case.family, settings)


@pytest.mark.parametrize("inputs", [[6], [4, 2], [1, 2, 3]])
def test_raft_stereo_takes_as_many_x_as_shape_names(inputs: list[int], tmp_path: Path) -> None:
    convs = {f"conv{letter}": nn.Conv2d(2 + 6, 2, 3) for letter in "zrq"}
    torch.save(nn.ModuleDict(convs).state_dict(), tmp_path / "c.pth")
    shapes = {f"x{index}": (1, size, 5, 6) for index, size in enumerate(inputs)} | {"cz": (1, 2, 5, 6)}
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"), "raft_stereo_convgru", {}, shapes)
    assert [spec.shape[1] for spec in model.inputs] == [*inputs, 2, 2, 2]  # type: ignore[union-attr]


def test_raft_stereo_with_the_shape_of_one_x_of_two(tmp_path: Path) -> None:
    convs = {f"conv{letter}": nn.Conv2d(2 + 6, 2, 3) for letter in "zrq"}
    torch.save(nn.ModuleDict(convs).state_dict(), tmp_path / "c.pth")
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"), "raft_stereo_convgru", {}, {"x0": (1, 4, 5, 6)})
    assert [spec.name for spec in model.inputs] == ["x0", "x1", "cz", "cr", "cq"]  # type: ignore[union-attr]


def test_no_spatial_size_of_a_linear_layer_is_the_published_one() -> None:
    sizes = {"input_channels": 1, "conv_filters": 1, "lstm_hidden_size": 2, "lstm_layers": 1, "fc_units": None}
    model = FAMILIES["conv2d_lstm_heads"].build(cls="ConvLSTM_FCL", **sizes, fc_spatial=None)
    assert model.inputs[0].shape == ("batch", 1, 64, 64)


def test_every_activation_of_a_stack(tmp_path: Path) -> None:
    names = [name for name in ACTIVATIONS if name != "tanh"]
    model, steps = activated(names, tmp_path)
    x = torch.randn(5, 1, 2, 4, 5)
    with torch.no_grad():
        got, _ = run_sequence(model, x)  # type: ignore[arg-type]
    worst = max(float((y - expected).abs().max()) for y, expected in zip(got, steps(x), strict=True))
    assert worst < 1e-5, f"off by {worst:.2g}"


def test_activations_in_the_exported_file(tmp_path: Path) -> None:
    model, steps = activated(["gelu", "mish"], tmp_path)
    export_onnx(model, tmp_path / "m.onnx", precision="float32")
    x = torch.randn(5, 1, 2, 4, 5)
    with StepLoop.open(tmp_path / "m.onnx") as loop:
        got = [loop.step(x=frame.numpy())["y"] for frame in x]
    worst = max(np.abs(y - expected.numpy()).max() for y, expected in zip(got, steps(x), strict=True))
    assert worst < 1e-5, f"off by {worst:.2g}"


def activated(names: list[str], folder: Path) -> tuple[nn.Module, Callable[[Tensor], list[Tensor]]]:
    """A stack of two channels with these activations, and the same as plain torch, clip to outputs."""
    torch.manual_seed(0)
    layers = []
    for _ in names:
        convs = {"conv_zr": nn.Conv2d(4, 4, 3), "conv_h1": nn.Conv2d(2, 2, 3), "conv_h2": nn.Conv2d(2, 2, 3)}
        layers.append(nn.ModuleDict(convs).state_dict())
    torch.save({f"cell_list.{i}.{key}": t for i, own in enumerate(layers) for key, t in own.items()}, folder / "c.pth")
    model, _, _ = step_model(load_checkpoint(folder / "c.pth"), "aserdega_convgru", {"activation": names})

    def conv(own: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, own[f"{name}.weight"], own[f"{name}.bias"], padding=1)

    def steps(clip: Tensor) -> list[Tensor]:
        hidden, outputs = [torch.zeros_like(clip[0]) for _ in names], []
        for y in clip:
            for layer, (own, name) in enumerate(zip(layers, names, strict=True)):
                activation, h = getattr(torch if name == "sigmoid" else F, name), hidden[layer]
                z, r = conv(own, "conv_zr", torch.cat([y, h], dim=1)).sigmoid().chunk(2, dim=1)
                y = hidden[layer] = z * h + (1 - z) * activation(conv(own, "conv_h1", y) + r * conv(own, "conv_h2", h))
            outputs.append(y)
        return outputs

    return model, steps


@pytest.mark.parametrize(("inputs", "names"), [(2, ["x0"]), (3, ["x0"]), (4, ["x0", "x1"])])
def test_raft_stereo_reads_one_x_with_as_many_channels_as_the_state(inputs: int, names: list[str]) -> None:
    convs = {f"conv{letter}": nn.Conv2d(2 + inputs, 2, 3) for letter in "zrq"}
    checkpoint = Checkpoint(Path("c.pth"), nn.ModuleDict(convs).state_dict(), "", None, {})
    model, _, _ = step_model(checkpoint, "raft_stereo_convgru")
    assert [spec.name for spec in model.inputs] == [*names, "cz", "cr", "cq"]  # type: ignore[union-attr]
