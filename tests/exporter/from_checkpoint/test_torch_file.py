"""Files that are refused, with what to do: pickled objects, other formats, files that unpack to too much."""

from __future__ import annotations

import gzip
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from stepcell.cli import main
from stepcell.errors import CheckpointError
from stepcell.exporter import load_checkpoint, load_model, step_model
from stepcell.exporter.from_checkpoint import expansion


def weights() -> dict[str, Tensor]:
    return nn.GRU(3, 4).state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module(zipped: bool, tmp_path: Path) -> None:
    torch.save(nn.GRU(3, 4), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    text = refusal(tmp_path / "net.pth")
    assert "holds pickled Python objects, which are never loaded (torch.nn.modules.rnn.GRU" in text
    assert '  model = torch.load("net.pth", map_location="cpu", weights_only=False)\n' in text
    assert '  torch.save(model.state_dict(), "net-weights.pth")' in text


@pytest.mark.parametrize("zipped", [True, False])
def test_what_the_hint_says_works(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"params_ema": weights(), "args": Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "c.ckpt", _use_new_zipfile_serialization=zipped)
    text = refusal(tmp_path / "c.ckpt")
    assert "(argparse.Namespace)" in text
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in text.splitlines()[-2:]), {"torch": torch})
    assert load_model("c-weights.pth").states[0].name == "h"  # type: ignore[index, union-attr]


def test_an_old_file_of_plain_weights_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert step_model(load_checkpoint(tmp_path / "old.pth"))[1] == "gru"


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "s.pt")
    text = refusal(tmp_path / "s.pt")
    assert "a TorchScript archive" in text
    assert 'module = torch.jit.load("s.pt", map_location="cpu")' in text
    assert "stepcell export s-weights.pth --module package.module:Class" in text


def save_arrays(path: Path, save: Callable[..., None]) -> None:
    with path.open("wb") as file:  # given a path, NumPy adds its suffix
        save(file, np.ones(3))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>"), "download the file again"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"abc")), "gunzip it first"),
    "array": (lambda p: save_arrays(p, np.save), "a NumPy array"),
    "archive": (lambda p: save_arrays(p, np.savez), "a NumPy archive"),
    "zip": (lambda p: p.write_bytes(b"PK\5\6" + bytes(18)), "a zip file of another program"),
    "shards": (lambda p: p.write_text('{"weight_map": {}}'), "load the shards"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_named(kind: str, tmp_path: Path) -> None:
    make, message = OTHERS[kind]
    make(tmp_path / "c.pth")
    text = refusal(tmp_path / "c.pth")
    assert "not a PyTorch checkpoint" in text
    assert message in text


def test_an_onnx_file_is_for_fuse(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a")
    assert f"stepcell fuse {tmp_path / 'm.onnx'}" in refusal(tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated
def test_a_quantised_model(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}, dtype=torch.qint8)
    torch.save(quantised.state_dict(), tmp_path / "q.pth")
    assert "holds the packed weights of a quantised model" in refusal(tmp_path / "q.pth")


def test_formats_go_by_their_content(tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "c.pth")
    torch.save(weights(), tmp_path / "c.safetensors")
    for name in ("c.pth", "c.safetensors"):
        assert step_model(load_checkpoint(tmp_path / name))[1] == "gru"


def compressed(path: Path, size: int) -> None:
    """A file of torch.save with one compressed storage of this many zeros."""
    torch.save({"w": torch.zeros(4, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {entry: old.read(entry) for entry in old.infolist()}
    wide = b"J" + struct.pack("<i", size)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, content in entries.items():
            if entry.filename.endswith("data.pkl"):
                new.writestr(
                    entry.filename, content.replace(b"K\x04t", wide + b"t").replace(b"K\x04\x85", wide + b"\x85")
                )
            elif entry.filename.endswith("/data/0"):
                with new.open(entry.filename, "w") as file:
                    for _ in range(size >> 20):
                        file.write(bytes(1 << 20))
            else:
                new.writestr(entry.filename, content)


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "_ALWAYS", 1 << 20)
    compressed(tmp_path / "c.pth", 30 << 20)
    assert (tmp_path / "c.pth").stat().st_size < 1 << 20

    def load(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", load)
        assert "unpack to 31.5 MB; at most 8 times the size" in refusal(tmp_path / "c.pth")
        result = CliRunner().invoke(main, ["export", str(tmp_path / "c.pth"), "-o", str(tmp_path / "m.onnx")])
    assert result.exit_code == 1
    factor = float(result.output.split("--max-expansion ")[1].split()[0])
    content = load_checkpoint(tmp_path / "c.pth", max_expansion=factor)
    assert content.tensors["w"].numel() == 30 << 20


def test_views_that_are_larger_than_their_storage(tmp_path: Path) -> None:
    torch.save({"weight_ih_l0": torch.zeros(1).expand(2**15, 2**15)}, tmp_path / "c.pth")
    assert "that unpack to 4.3 GB" in refusal(tmp_path / "c.pth")


def test_a_model_much_larger_than_its_checkpoint(tmp_path: Path) -> None:
    wide = {"down.weight": torch.zeros(1).expand(2**20, 3), "encoder.weight": torch.zeros(1)}
    wide |= {name: torch.zeros(1) for name in ("cell.weight_x", "decoder.weight", "up.weight")}
    torch.save(wide, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"a model of these sizes has [\d,]+ values, the checkpoint 3,145,732"):
        step_model(load_checkpoint(tmp_path / "c.pth"))
