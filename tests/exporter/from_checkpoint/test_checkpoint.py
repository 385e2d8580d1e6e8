"""Checkpoint reader and step_model: formats, recognition of families, refused files and arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from stepcell.errors import CheckpointError, InputError, UsageError
from stepcell.exporter import FAMILIES, export_onnx, load_checkpoint, load_model, step_model
from stepcell.models import conv_gru_stack, conv_lstm_stack, run_sequence, save_checkpoint
from stepcell.models.zoo.denoiser import Denoiser


class Payload:
    """Object in a malicious or careless checkpoint that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_saved_checkpoint_comes_back(tmp_path: Path, denoiser: Denoiser) -> None:
    save_checkpoint(denoiser, tmp_path / "d.safetensors", family="denoiser", arguments={"hidden": 8})
    model, family, arguments = step_model(load_checkpoint(tmp_path / "d.safetensors"))
    assert (family, arguments) == ("denoiser", {"hidden": 8})
    x = torch.rand(4, 1, 3, 16, 16)
    assert torch.equal(run_sequence(model, x)[0], run_sequence(denoiser, x)[0])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_training_files_are_unwrapped_and_recognised(wrap, prefix: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    state = {prefix + name: tensor for name, tensor in conv_gru_stack(3, [4, 6], [3, (1, 5)]).state_dict().items()}
    torch.save(wrap(state), tmp_path / "c.pth")
    model, family, arguments = step_model(load_checkpoint(tmp_path / "c.pth"))
    assert family == "convgru"
    assert arguments["hidden_sizes"] == [4, 6]
    assert arguments["kernel_sizes"] == [[3, 3], [1, 5]]
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize(
    ("module", "family"),
    [
        (conv_gru_stack(3, [4], [3], reset="after"), "convgru"),
        (conv_lstm_stack(3, [4, 5], [3, 1]), "convlstm"),
        (nn.GRU(6, 4, num_layers=2), "gru"),
        (nn.LSTM(6, 4, bias=False), "lstm"),
        (Denoiser(4), "denoiser"),
    ],
)
def test_each_family_is_recognised_and_exports(module: nn.Module, family: str, tmp_path: Path) -> None:
    torch.save(module.state_dict(), tmp_path / "c.pth")
    model, found, _ = step_model(load_checkpoint(tmp_path / "c.pth"))
    assert found == family
    contract = export_onnx(model, tmp_path / "m.onnx", precision="float32")
    assert len(contract.states) == len(model.states)


def test_gru_family_equals_the_torch_layer_it_came_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gru = nn.GRU(6, 4, num_layers=2)
    torch.save(gru.state_dict(), tmp_path / "c.pth")
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"))
    x = torch.randn(20, 3, 6)
    torch.testing.assert_close(run_sequence(model, x)[0], gru(x)[0])


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(3), "payload": Payload()}, "evil.pth")
    with pytest.raises(CheckpointError, match="pickled Python objects, which are never loaded"):
        load_checkpoint(Path("evil.pth"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save({"weight": torch.zeros(100)}, path)
    else:
        safetensors.torch.save_file({"weight": torch.zeros(100)}, path)
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"hello world, no weights", "empty": b""}[damage]
    )
    with pytest.raises(CheckpointError, match=r"not a (valid|PyTorch)"):
        load_checkpoint(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="got a folder"):
        load_checkpoint(tmp_path)


def test_nan_weights(tmp_path: Path) -> None:
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="weight holds NaN"):
        load_checkpoint(tmp_path / "c.pth")


def test_foreign_checkpoint_lists_why_each_family_was_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="matches no known model family") as caught:
        step_model(load_checkpoint(tmp_path / "c.pth"))
    asked = [family.name for family in FAMILIES.values() if not family.by_name]
    assert all(f"{name}: " in str(caught.value) for name in asked)


@pytest.mark.parametrize(("former", "name"), [("seed000_gru_heads", "pooled_gru_heads")])
def test_a_former_name_of_a_family_stays_valid(former: str, name: str, tmp_path: Path) -> None:
    torch.save(nn.GRU(6, 4).state_dict(), tmp_path / "c.pth")
    _, found, arguments = step_model(load_checkpoint(tmp_path / "c.pth"), former, {"head": "gap"})
    assert found == name
    model = load_model(tmp_path / "c.pth", former)
    save_checkpoint(model, tmp_path / "old.safetensors", family=former, arguments=arguments)
    model, found, again = step_model(load_checkpoint(tmp_path / "old.safetensors"))
    assert (found, again) == (name, arguments)


def test_ignored_arguments_are_accepted_and_do_not_reach_the_builder(tmp_path: Path) -> None:
    convs = {f"cell_list.0.{name}": nn.Conv2d(5, size, 3) for name, size in (("conv_gates", 4), ("conv_can", 2))}
    tensors = {f"{name}.{key}": t for name, conv in convs.items() for key, t in conv.state_dict().items()}
    torch.save(tensors, tmp_path / "c.pth")
    _, family, arguments = step_model(load_checkpoint(tmp_path / "c.pth"), None, {"dtype": "torch.FloatTensor"})
    assert family == "happyjin_convgru"
    assert arguments["dtype"] == "torch.FloatTensor"


def test_wrong_arguments(tmp_path: Path) -> None:
    torch.save(Denoiser(4).state_dict(), tmp_path / "c.pth")
    content = load_checkpoint(tmp_path / "c.pth")
    with pytest.raises(UsageError, match="no such argument"):
        step_model(content, overrides={"hiden": 4})
    with pytest.raises(CheckpointError, match=r"cell.bias: expected \(15,\), got \(12,\)"):
        step_model(content, overrides={"hidden": 5})
    with pytest.raises(UsageError, match="--family rvm: unknown"):
        step_model(content, "rvm")
    with pytest.raises(CheckpointError, match="not a checkpoint of family gru"):
        step_model(content, "gru")
