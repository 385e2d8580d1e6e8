"""Which weights of a training checkpoint are taken: wrappers, parts of networks, running averages."""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from stepcell.cli import main
from stepcell.errors import CheckpointError, UsageError
from stepcell.exporter import Checkpoint, load_checkpoint, load_model, step_model
from stepcell.exporter.from_checkpoint.families.family import NotThisFamily
from stepcell.exporter.from_checkpoint.part import fitting_parts
from stepcell.exporter.from_checkpoint.step_model import family_model
from stepcell.models import conv_gru_stack

Tensors = dict[str, Tensor]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def convs(**sizes: tuple[int, int, int, int]) -> Tensors:
    """Weights and biases of convolutions, by name."""
    return nn.ModuleDict({n: nn.Conv2d(i, o, (h, w)) for n, (i, o, h, w) in sizes.items()}).state_dict()


def raft_gru(hidden: int = 4, inputs: int = 3) -> Tensors:
    return convs(**{f"conv{letter}": (hidden + inputs, hidden, 3, 3) for letter in "zrq"})


def sep_gru(hidden: int = 4, inputs: int = 3) -> Tensors:
    sizes = {f"conv{g}{k}": (hidden + inputs, hidden, *s) for k, s in (("1", (1, 5)), ("2", (5, 1))) for g in "zrq"}
    return convs(**sizes)  # type: ignore[arg-type]


def small_update_block() -> Tensors:
    encoder = convs(convc1=(9, 96, 1, 1), convf1=(2, 64, 7, 7), convf2=(64, 32, 3, 3), conv=(128, 80, 3, 3))
    gru = convs(**{f"conv{letter}": (96 + 146, 96, 3, 3) for letter in "zrq"})
    head = convs(conv1=(96, 128, 3, 3), conv2=(128, 2, 3, 3))
    return {**under("encoder.", encoder), **under("gru.", gru), **under("flow_head.", head)}


def save(folder: Path, content: object) -> Path:
    torch.save(content, folder / "c.pth")
    return folder / "c.pth"


def values(folder: Path, content: object, family: str | None = None, **options: Any) -> Tensors:
    model, _, _ = step_model(load_checkpoint(save(folder, content), **options), family)
    return model.state_dict()


def assert_equal(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


WRAPPERS = {
    "Lightning": lambda t: {"epoch": 3, "state_dict": under("model.", t), "optimizer_states": [{"state": {}}]},
    "DataParallel": lambda t: under("module.", t),
    "torch.compile": lambda t: under("_orig_mod.", t),
    "all of them": lambda t: {"state_dict": under("model._orig_mod.module.", t), "hyper_parameters": {"lr": 1e-4}},
    "any name": lambda t: {"netG": under("net.backbone.", t)},
    "SWA AveragedModel": lambda t: {"n_averaged": torch.tensor(7), **under("module.", t)},
    "DeepSpeed": lambda t: {"module": under("module.", t), "ds_version": "0.14", "buffer_names": []},
    "mmcv": lambda t: {"meta": {"epoch": 3}, "state_dict": OrderedDict(under("backbone.", t)), "optimizer": {}},
    "timm": lambda t: {"arch": "x", "state_dict": t, "version": 2},
    "an optimiser with the same names": lambda t: {"model": t, "optimizer": {"exp_avg": t, "exp_avg_sq": t}},
    "a list": lambda t: [{"epoch": 3}, t],
    "counters beside the weights": lambda t: {**t, "n_averaged": torch.tensor(7), "loss": torch.tensor(0.1)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_found(wrapper: str, tmp_path: Path) -> None:
    tensors = sep_gru()
    assert_equal(values(tmp_path, WRAPPERS[wrapper](tensors)), values(tmp_path, tensors))


def test_a_network_inside_a_network_is_found_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = small_update_block()
    whole = {**under("module.update_block.", block), **under("module.fnet.", convs(conv1=(3, 8, 7, 7)))}
    with caplog.at_level(logging.INFO, "stepcell"):
        got = family_model(load_checkpoint(save(tmp_path, whole)))
    assert got.family == "raft_update_block"
    assert got.source == {"checkpoint_prefix": "module.update_block."}
    assert_equal(got.model.state_dict(), values(tmp_path, block))
    assert f"weights: {len(block)} tensors under module.update_block." in caplog.text
    assert "2 of 20 tensors are not part of raft_update_block and are left out: module.fnet" in caplog.text


def test_a_cell_inside_an_unknown_network_is_asked_for(tmp_path: Path) -> None:
    cell = sep_gru()
    path = save(tmp_path, {**under("head.gru.", cell), **under("head.", convs(out=(4, 1, 1, 1)))})
    with pytest.raises(UsageError, match="12 of its 14 tensors fit family raft_sepconvgru, a cell") as caught:
        step_model(load_checkpoint(path))
    assert caught.value.hint is not None
    assert "--prefix head.gru." in caught.value.hint
    assert "--module" in caught.value.hint
    expected = values(tmp_path, cell)
    path = save(tmp_path, {**under("head.gru.", cell), **under("head.", convs(out=(4, 1, 1, 1)))})
    for family, prefix in ((None, "head.gru."), (None, "head.gru"), ("raft_sepconvgru", None)):
        model, _, _ = step_model(load_checkpoint(path, prefix=prefix), family)
        assert_equal(model.state_dict(), expected)


def test_several_parts_are_asked_for(tmp_path: Path) -> None:
    grus = {f"update_block.gru{name}.": raft_gru() for name in ("08", "16", "32")}
    path = save(tmp_path, {name: t for prefix, gru in grus.items() for name, t in under(prefix, gru).items()})
    with pytest.raises(UsageError, match="3 sets of weights in it fit family raft_stereo_convgru") as caught:
        step_model(load_checkpoint(path), "raft_stereo_convgru")
    lines = re.findall(r"--prefix (\S+)", caught.value.hint or "")
    assert lines == list(grus)
    model, _, _ = step_model(load_checkpoint(path, prefix=lines[1]), "raft_stereo_convgru")
    assert torch.equal(model.state_dict()["cell.candidate.bias"], grus[lines[1]]["convq.bias"])


def test_a_damaged_network_is_not_taken_for_a_part_of_it(tmp_path: Path) -> None:
    block = small_update_block()
    del block["flow_head.conv2.bias"]
    with pytest.raises(CheckpointError, match=r"raft_update_block: no tensor flow_head\.conv2\.bias"):
        step_model(load_checkpoint(save(tmp_path, under("module.", block))))


def average(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


AVERAGES = {
    "BasicSR": (lambda raw, ema: {"params": raw, "params_ema": ema}, "params", "params_ema"),
    "timm": (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "state_dict", "state_dict_ema"),
    "model_ema": (lambda raw, ema: {"model": raw, "model_ema": ema, "epoch": 1}, "model", "model_ema"),
    "ModelEma": (lambda raw, ema: {"model": raw, "ema": {"module": ema, "decay": 0.99}}, "model", "ema.module"),
    "a GAN": (lambda raw, ema: {"g": raw, "d": convs(a=(1, 1, 1, 1)), "g_ema": ema}, "g", "g_ema"),
    "a callback": (
        lambda raw, ema: {"state_dict": under("model.", raw), "callbacks": {"EMA": {"ema_state_dict": ema}}},
        "state_dict",
        "callbacks.EMA.ema_state_dict",
    ),
    "Lightning": (
        lambda raw, ema: {"state_dict": ema, "current_model_state": raw, "averaging_state": {"n": torch.tensor(3)}},
        "current_model_state",
        "state_dict",
    ),
    "a list": (
        lambda raw, ema: {"net": raw, "ema": {"shadow_params": list(ema.values()), "decay": 0.99}},
        "net",
        "ema.shadow_params",
    ),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_raw_and_averaged_weights_that_both_fit_are_asked_for(kind: str, tmp_path: Path) -> None:
    make, raw_key, ema_key = AVERAGES[kind]
    raw = sep_gru()
    ema = average(raw)
    path = save(tmp_path, make(raw, ema))
    with pytest.raises(UsageError, match="2 sets of weights in it fit family raft_sepconvgru") as caught:
        step_model(load_checkpoint(path))
    hint = caught.value.hint or ""
    assert sorted(re.findall(r"--checkpoint-key (\S+)", hint)) == sorted([raw_key, ema_key])
    assert hint.count("a running average") == 1
    assert re.search(rf"{re.escape(ema_key)}  \(12 tensors, a running average of the weights\)", hint)
    content = make(raw, ema)
    for key, expected in ((raw_key, raw), (ema_key, ema)):
        assert_equal(values(tmp_path, content, key=key), values(tmp_path, expected))


def test_raw_and_averaged_weights_under_two_prefixes(tmp_path: Path) -> None:
    raw = sep_gru()
    path = save(tmp_path, {"state_dict": {**under("model.", raw), **under("ema_model.module.", average(raw))}})
    with pytest.raises(UsageError) as caught:
        load_model(path)
    assert "--prefix model.  (12 tensors)" in str(caught.value)
    assert "--prefix ema_model.module.  (12 tensors, a running average of the weights)" in str(caught.value)
    assert_equal(load_model(path, prefix="ema_model.").state_dict(), values(tmp_path, average(raw)))


def test_the_only_set_that_fits_is_taken_and_the_other_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = sep_gru()
    partial = average(raw)
    del partial["convz1.bias"]
    for content, taken, other in (
        ({"params": raw, "params_ema": partial}, "params", "params_ema, a running average by its name,"),
        (
            {"params": raw, "ema": {"shadow_params": list(partial.values())}},
            "params",
            "ema.shadow_params, a running average by its name,",
        ),
        ({"params": partial, "params_ema": raw}, "params_ema", "params, the weights that were not averaged,"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "stepcell"):
            got = values(tmp_path, content)
        assert_equal(got, values(tmp_path, raw))
        assert f"weights: 12 tensors of {taken}" in caplog.text
        assert f"note: {other} was not taken: it does not fit raft_sepconvgru (" in caplog.text
        assert "tensor convz1.bias" in caplog.text or "unexpected tensor 0" in caplog.text


@pytest.mark.parametrize("make", [sep_gru, small_update_block])
def test_the_same_values_twice_are_no_choice(make: Callable[[], Tensors], tmp_path: Path) -> None:
    raw = make()
    copy = {name: tensor.clone() for name, tensor in raw.items()}
    assert_equal(values(tmp_path, {"model": raw, "model_ema": copy}), values(tmp_path, raw))


def test_a_large_network_with_many_layers_is_searched_once_per_kind_of_layer() -> None:
    layer = torch.zeros(2, 2)
    names = [f"enc.layers.{i}.block.{j}.attn.{k}.weight" for i in range(30) for j in range(10) for k in range(10)]
    seen: list[int] = []

    def matches(tensors: Mapping[str, Tensor]) -> None:
        seen.append(len(tensors))
        raise NotThisFamily("none")

    checkpoint = Checkpoint(Path("c.pth"), dict.fromkeys(names, layer), "", None, {})
    assert fitting_parts(checkpoint, matches)[0] == []
    assert len(seen) < 20


def test_a_key_or_prefix_that_is_not_there(tmp_path: Path) -> None:
    path = save(tmp_path, {"params": under("net.", sep_gru())})
    with pytest.raises(UsageError, match=r"--checkpoint-key params_ema: .* no tensors there\n.*params \(12 tensors\)"):
        load_checkpoint(path, key="params_ema")
    with pytest.raises(UsageError, match=r"--prefix model\.: .*\n.*its names start with net\."):
        load_checkpoint(path, prefix="model")


def test_a_file_without_weights(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, {"state_dict": {}}, [], 3):
        with pytest.raises(CheckpointError, match="holds no tensors"):
            load_checkpoint(save(tmp_path, content))


MODULE = """
import torch
from torch import nn
from stepcell import StateSpec, TensorSpec
from stepcell.models import ConvGRUCell

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        shape = ("batch", 2, "height", "width")
        self.inputs = [TensorSpec(name="x", shape=shape, layout="NCHW")]
        self.outputs = [TensorSpec(name="y", shape=shape, layout="NCHW")]
        self.states = [StateSpec(name="h", shape=shape)]
        self.cell = ConvGRUCell(2, 2, 3)

    def forward(self, x, h):
        return self.cell(x, h)
"""


def export(folder: Path, *arguments: str) -> Result:
    words = ["export", str(folder / "c.pth"), "-o", str(folder / "m.onnx"), "--precision", "float32", *arguments]
    return CliRunner().invoke(main, words)


def source(path: Path) -> dict[str, Any]:
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return json.loads(properties["stepcell.contract"])["source"]  # type: ignore[no-any-return]


def test_own_module_from_a_lightning_checkpoint_with_an_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_net_of_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    cell = under("cell.", conv_gru_stack(2, [2], [3]).cells[0].state_dict())
    lightning = {**under("model.", cell), **under("loss.vgg.", convs(a=(1, 1, 1, 1)))}
    save(tmp_path, {"state_dict": lightning, "callbacks": {"EMA": {"ema": under("model.", average(cell))}}})
    module = ("--module", "own_net_of_parts:Net")
    result = export(tmp_path, *module)
    assert result.exit_code == 2
    assert "--checkpoint-key callbacks.EMA.ema  (4 tensors, a running average of the weights)" in result.output
    result = export(tmp_path, *module, "--checkpoint-key", "state_dict")
    assert result.exit_code == 0, result.output
    assert "2 of 6 tensors are not part of --module own_net_of_parts:Net and are left out: loss" in result.output
    assert source(tmp_path / "m.onnx")["checkpoint_key"] == "state_dict"
    assert source(tmp_path / "m.onnx")["checkpoint_prefix"] == "model."
    verify = ["verify", "m.onnx", "--against", "c.pth", "--steps", "3", "--warm-up", "2", "--shape", "x:1x2x8x8"]
    result = CliRunner().invoke(main, verify)
    assert result.exit_code == 0, result.output
    save(tmp_path, {"state_dict": {name.replace("bias", "b"): tensor for name, tensor in lightning.items()}})
    result = export(tmp_path, *module)
    assert result.exit_code == 1
    assert "missing cell.bias (6,); unexpected cell.b (6,)" in result.output


def test_options_without_a_checkpoint() -> None:
    result = CliRunner().invoke(main, ["export", "--module", "a:b", "--prefix", "model."])
    assert result.exit_code == 2
    assert "there is none" in result.output
