"""Files of `torch.save`, read as data: no object in them is rebuilt, and none may unpack to much more than its size."""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch

from stepcell.errors import CheckpointError
from stepcell.exporter.from_checkpoint.expansion import check_expansion
from stepcell.exporter.from_checkpoint.printable import first_line, printable
from stepcell.exporter.torchscript import torchscript_hint
from stepcell.files import read_bytes

__all__ = ["read_torch_file"]

# What the first bytes say that a file is, if it is no checkpoint, and what to do with it.
_OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
    b"\x89HDF": ("an HDF5 file (Keras)", "stepcell reads PyTorch weights"),
    b"<!DOCTYPE": ("a web page", "download the file again, from the link to the file itself"),
    b"<html": ("a web page", "download the file again, from the link to the file itself"),
    b"\x1f\x8b": ("compressed with gzip", "gunzip it first"),
    b"{": ("a JSON file, such as the index of several shards", "load the shards, save their tensors in one file"),
    b"\x93NUMPY": ("a NumPy array", "save a state_dict with torch.save or safetensors"),
}
# Names in every file of `torch.save`: tensors, their storages and dtypes, plain collections.
_HARMLESS = re.compile(
    r"torch\.(?!ScriptObject)\w+|torch\.(_utils|_tensor)\._rebuild_\w+|torch\.storage\.\w+|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.serialization\._get_layout|collections\.\w+|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
)
# Keys under which training scripts store weights, to name the likely one in a hint.
_KEYS = ("state_dict", "model_state_dict", "params_ema", "params", "model_state", "model", "net", "module")


def read_torch_file(path: Path, max_expansion: float) -> object:
    """Content of the file: dicts, lists, numbers and tensors, on the CPU.

    Args:
        max_expansion: see `check_expansion`.

    Raises:
        CheckpointError: damaged, of another format, holding pickled objects, or unpacking to too much.
    """
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path}: an ONNX file, not a checkpoint", hint=f"stepcell fuse {path} -o fused.onnx")
    head = read_bytes(path, 32)
    for magic, (what, remedy) in _OTHERS.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path}: not a PyTorch checkpoint: {what}", hint=remedy)
    if head.startswith(b"PK"):
        _check_archive(path, max_expansion)
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # given a path, torch goes by the suffix
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on the damage
        raise _refusal(path, error) from error


def _check_archive(path: Path, max_expansion: float) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"{path}: not a PyTorch checkpoint or a damaged one: {first_line(error)}") from error
    check_expansion(path, sum(entries.values()), max_expansion)
    parts = {name.partition("/")[2] for name in entries}
    if "constants.pkl" in parts:
        raise CheckpointError(
            f"{path}: a TorchScript archive, which holds code beside the weights",
            hint=torchscript_hint(path.name),
        )
    if "data.pkl" not in parts:
        what = "a NumPy archive" if any(name.endswith(".npy") for name in entries) else "a zip file of another program"
        raise CheckpointError(f"{path}: not a PyTorch checkpoint: {what}", hint="save a state_dict with torch.save")


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    unsafe = "weights_only" in text
    strings, names = _strings_and_globals(path) if unsafe else ([], [])
    found = [printable(name) for name in dict.fromkeys(names) if not _HARMLESS.fullmatch(name)]
    if not found:
        reason = "" if unsafe else f": {first_line(error)}"
        return CheckpointError(
            f"{path}: not a PyTorch checkpoint or a damaged one{reason}",
            hint="compare its size and hash with the original; a file of an old torch or Python is written again with\n"
            f'  content = torch.load("{path.name}", map_location="cpu", weights_only=False)  # only a file you trust\n'
            f'  torch.save(content, "{path.stem}-new.pth")',
        )
    if "torch.ScriptObject" in found:
        return CheckpointError(
            f"{path}: holds the packed weights of a quantised model (torch.ScriptObject)",
            hint="export the float checkpoint it was made from",
        )
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    content, saved = "content", f'content["{_likely_key(strings)}"]'
    if any(name.startswith("torch.nn.modules.") for name in found):
        content, saved = "model", "model.state_dict()"
    return CheckpointError(
        f"{path}: holds pickled Python objects, which are never loaded ({shown})",
        hint=f"write the weights alone, where its classes can be imported and only from a file you trust:\n"
        f'  {content} = torch.load("{path.name}", map_location="cpu", weights_only=False)\n'
        f'  torch.save({saved}, "{path.stem}-weights.pth")',
    )


def _pickles(path: Path) -> bytes:
    """The pickled part of a file."""
    data = read_bytes(path)
    if not data.startswith(b"PK"):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _strings_and_globals(path: Path) -> tuple[list[str], list[str]]:
    """Strings and names of classes and functions in the pickles, as far as they can be read; none is imported."""
    strings: list[str] = []
    names: list[str] = []
    with contextlib.suppress(Exception):  # whatever a damaged stream raises
        data = io.BytesIO(_pickles(path))
        while True:  # an old file holds several pickles
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return strings, names


def _likely_key(strings: list[str]) -> str:
    return next((key for key in _KEYS if key in strings), _KEYS[0])
