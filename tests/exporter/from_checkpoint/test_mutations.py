"""Damaged and odd checkpoints end in an error of stepcell's own or in a model, whatever was changed.

`python -m tests.exporter.from_checkpoint.test_mutations 3000` tries as many as one likes.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stepcell.errors import StepcellError
from stepcell.exporter import load_checkpoint, step_model
from stepcell.exporter.from_checkpoint.step_model import load_weights

COUNT = 150
CONV = nn.Conv2d(7, 16, 3)
BASES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("gru", lambda: nn.GRU(3, 4)),
    ("raft_convgru", lambda: nn.ModuleDict({f"conv{gate}": nn.Conv2d(7, 4, 3) for gate in "zrq"})),
    ("mangrick_gru_rcn", lambda: nn.ParameterDict({"W": torch.ones(6, 3, 3, 3), "U": torch.ones(4, 2, 3, 3)})),
    ("ndrplz_convlstm", lambda: nn.ModuleDict({"cell_list": nn.ModuleList([nn.ModuleDict({"conv": CONV})])})),
]
TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.uint16),
    lambda t: t.to(torch.complex64),
    lambda t: t > 0,
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.double(),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda _: torch.empty(2**40, device="meta"),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: torch.nested.nested_tensor([t], layout=torch.jagged),
    lambda t: t[:0],
    lambda t: t[..., None],
    lambda t: t.flatten(),
    lambda _: torch.zeros(()),
    lambda t: torch.zeros(1).expand(t.shape),
    lambda _: torch.zeros(1).expand(2**20, 2**20),
    lambda _: torch.zeros(1).expand(2**25),
    lambda t: t * float("inf"),
    lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t,
    lambda t: t.T if t.dim() == 2 else t,
    lambda t: t.storage().untyped(),
    lambda t: t.tolist(),
    lambda t: t.shape,
    lambda _: None,
    lambda _: 3,
    lambda _: "text",
    lambda t: {"weight": t},
    lambda t: [t, t],
    lambda _: {1, 2},
]
WRAPPERS: list[Callable[[Any], Any]] = [
    lambda c: {"state_dict": c},
    lambda c: {"model": c, "model_ema": c},
    lambda c: {"params": c, "ema": {"shadow_params": [t for t in c.values() if isinstance(t, Tensor)]}},
    lambda c: {f"module.{name}": tensor for name, tensor in c.items()},
    lambda c: {"n_averaged": torch.tensor(3), **c},
    lambda c: {0: c, (1, 2): c, None: 1},
    lambda c: {**c, "self": c},
    lambda c: OrderedDict(c),
    lambda c: [c, [c]],
    lambda c: next(iter(c.values()), None),
    lambda c: {"optimizer": {"state": {0: {"exp_avg": c}}}, "net": c},
]


def structure(rng: random.Random) -> tuple[str, Any]:
    """A family and a checkpoint's content, changed in some places."""
    family, make = rng.choice(BASES)
    content: Any = dict(make().state_dict())
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice(list(content))
        change = rng.randrange(4)
        if change == 0:
            content[name] = rng.choice(TENSORS)(content[name]) if isinstance(content[name], Tensor) else 1
        elif change == 1:
            content[rng.choice(["", ".", "a..b", "é", f"x.{name}", "conv.bias"])] = content.pop(name)
        elif change == 2:
            del content[name]
            content = content or {"a": torch.zeros(())}
        else:
            content[name + rng.choice([".", "_ema", "0"])] = content[name]
    for _ in range(rng.choice([0, 0, 1, 2])):
        content = rng.choice(WRAPPERS)(content) if isinstance(content, dict) else content
    if isinstance(content, dict) and rng.random() < 0.1:
        content["loop"] = content
    return family, content


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same bytes with some changed, removed, repeated or added."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, size = rng.randrange(len(out)), rng.choice([1, 1, 4, 8, 100])
        change = rng.randrange(6)
        if change <= 1:
            out[at] = rng.randrange(256)
        elif change == 2:
            del out[at : at + size]
        elif change == 3:
            out[at:at] = rng.randbytes(size)
        elif change == 4:
            out[at : at + size] = struct.pack("<q", rng.choice([0, -1, 2**31, 2**40, 2**62]))
        else:
            del out[at:]
        out = out or bytearray(b"\0")
    return bytes(out)


def header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack("<q", data[:8])
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice(list(header))]
    if change := rng.randrange(4):
        field = rng.choice(["dtype", "shape", "data_offsets"])
        values = ["F64", "F8_E4M3", "X", "BOOL", [2**62, 8], [-1], [], [0, 2**40], [0, 0], None, {}]
        entry[field] = rng.choice(values) if change > 1 else entry.pop(field, None)
    else:
        header["__metadata__"] = rng.choice([{}, {"stepcell.family": "gru"}, {"stepcell.arguments": "["}, 3, {"a": 1}])
    text = json.dumps(header).encode()
    return struct.pack("<q", len(text)) + text + data[8 + size :]


def pickle_damaged(data: bytes, rng: random.Random) -> bytes:
    """A zip file of torch.save with a damaged pickle, and sums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged(content, rng) if name.endswith("data.pkl") else content)
    return out.getvalue()


def mutant(seed: int, folder: Path) -> tuple[Path, str]:
    """A changed checkpoint and the family it was made from; the same for the same seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice(["structure", "structure", "bytes", "pickle", "old", "safetensors", "header"])
    path = folder / ("c.safetensors" if kind in ("safetensors", "header") else "c.pth")
    if kind == "structure":
        family, content = structure(rng)
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
        return path, family
    family, make = rng.choice(BASES)
    tensors = make().state_dict()
    if path.suffix == ".safetensors":
        data = safetensors.torch.save(tensors)
        path.write_bytes((damaged if kind == "safetensors" else header_changed)(data, rng))
        return path, family
    file = io.BytesIO()
    torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=kind != "old")
    path.write_bytes((pickle_damaged if kind == "pickle" else damaged)(file.getvalue(), rng))
    return path, family


def outcome(seed: int, folder: Path) -> list[str]:
    """Names of the errors; any other one than stepcell's is raised."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path, family = mutant(seed, folder)
        except (RuntimeError, NotImplementedError, RecursionError, ValueError) as error:  # torch does not save it
            return [f"not saved: {type(error).__name__}"]
        for use in (
            lambda c: step_model(c),
            lambda c: step_model(c, family),
            lambda c: load_weights(dict(BASES)[family](), c, "a module"),
        ):
            try:
                use(load_checkpoint(path))
                found.append("taken")
            except StepcellError as error:
                found.append(type(error).__name__ if str(error).replace("\n", "").isprintable() else "not printable")
    return found


@pytest.mark.parametrize("first", range(0, COUNT, 50))
def test_mutants(first: int, tmp_path: Path) -> None:
    found = [name for seed in range(first, first + 50) for name in outcome(seed, tmp_path)]
    assert {"taken", "CheckpointError"} <= set(found)
    assert "not printable" not in found
    assert sum(name.startswith("not saved") for name in found) < 10


if __name__ == "__main__":
    first, last = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(first, last):
            try:
                for each in outcome(seed, Path(name)):
                    counts[each] = counts.get(each, 0) + 1
            except Exception:
                print(f"seed {seed}")
                traceback.print_exc()
                counts["traceback"] = counts.get("traceback", 0) + 1
    print(counts)
