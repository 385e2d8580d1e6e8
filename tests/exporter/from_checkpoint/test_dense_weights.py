"""What is no weight is refused with its name, and views of any kind give the right values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stepcell.errors import CheckpointError
from stepcell.exporter import load_checkpoint, step_model
from stepcell.exporter.from_checkpoint.step_model import load_weights

NAME = "weight_hh_l0"
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    **{
        f"{dtype}".removeprefix("torch."): (lambda t, dtype=dtype: t.to(dtype), "dtype .* is none of weights")  # type: ignore[misc]
        for dtype in (
            torch.int8, torch.uint8, torch.uint16, torch.int32, torch.int64, torch.bool,
            torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
        )
    },
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"quantised \(qint8\)"),
    "by channel": (
        lambda t: torch.quantize_per_channel(t, torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8),
        r"quantised \(qint8\)",
    ),
    "sparse": (lambda t: t.to_sparse(), r"sparse \(sparse_coo\)"),
    "sparse rows": (lambda t: t.to_sparse_csr(), r"sparse \(sparse_csr\)"),
    "meta": (lambda t: t.to("meta"), "on the meta device"),
    "empty": (lambda t: t[:0], None),  # type: ignore[dict-item]
    "nested": (lambda t: torch.nested.nested_tensor([t]), None),  # type: ignore[dict-item]
    "jagged": (lambda t: torch.nested.nested_tensor([t], layout=torch.jagged), None),  # type: ignore[dict-item]
    "NaN": (lambda t: t * float("nan"), "holds NaN or infinity"),
    "beyond float32": (lambda t: t.double() * 1e300, "holds .*, beyond float32's largest value"),
}  # fmt: skip


def weights(layers: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.GRU(3, 4, num_layers=layers).state_dict()


@pytest.mark.filterwarnings("ignore")  # torch warns of quantised, sparse and nested tensors
@pytest.mark.parametrize("kind", REFUSED)
def test_no_weights(kind: str, tmp_path: Path) -> None:
    change, message = REFUSED[kind]
    tensors = weights()
    torch.save({**tensors, NAME: change(tensors[NAME])}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message and f"tensor {NAME}:? {message}"):
        step_model(load_checkpoint(tmp_path / "c.pth"))
    with pytest.raises(CheckpointError, match=NAME):
        load_weights(nn.GRU(3, 4), load_checkpoint(tmp_path / "c.pth"), "a module")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn])
def test_no_weights_in_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: t.abs().to(dtype) if name == NAME else t for name, t in weights().items()}
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {NAME}: dtype {str(dtype)[6:]} is none of weights"):
        step_model(load_checkpoint(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    torch.save(tensors, tmp_path / "c.pth")
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"))
    assert torch.equal(model.state_dict()["cells.0.weight_n"][:, :, 0, 0], tensors[NAME][8:].float())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "from an offset": lambda t: torch.cat([torch.zeros(5, t.shape[1]), t])[5:],
    "parameter": lambda t: nn.Parameter(t),
    "buffer": lambda t: nn.Buffer(t),
    "negated lazily": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, tmp_path: Path) -> None:
    tensors = weights()
    torch.save({**tensors, NAME: VIEWS[view](tensors[NAME])}, tmp_path / "c.pth")
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"))
    assert torch.equal(model.state_dict()["cells.0.weight_n"][:, :, 0, 0], tensors[NAME][8:])


def test_tied_and_expanded_weights(tmp_path: Path) -> None:
    tensors = weights(2)
    tensors["bias_hh_l0"] = torch.full((1,), 0.5).expand(12)
    tensors["weight_hh_l1"] = tensors[NAME]
    torch.save(tensors, tmp_path / "c.pth")
    model, _, _ = step_model(load_checkpoint(tmp_path / "c.pth"))
    state = model.state_dict()
    assert torch.equal(state["cells.0.weight_n"], state["cells.1.weight_n"])
    assert torch.equal(state["cells.0.bias_n"], torch.full((4,), 0.5))


class Counting(nn.Module):
    """A module with an index, a mask and a counter beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("index", torch.arange(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))


def test_integers_of_an_own_module(tmp_path: Path) -> None:
    module = Counting()
    with torch.no_grad():
        module.weight.mul_(3)
    torch.save(module.state_dict(), tmp_path / "c.pth")
    loaded = Counting()
    load_weights(loaded, load_checkpoint(tmp_path / "c.pth"), "a module")
    assert torch.equal(loaded.weight, module.weight)
    for name, value in (("weight", torch.ones(2, dtype=torch.int64)), ("index", torch.ones(3))):
        torch.save({**module.state_dict(), name: value}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=f"tensor {name}: "):
            load_weights(Counting(), load_checkpoint(tmp_path / "c.pth"), "a module")


def test_a_statistic_that_becomes_nan(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(8).state_dict()
    norm["running_var"].fill_(-1)
    lstm = {"conv_x2h.module.0": nn.Conv2d(2, 8, 3), "timepool.conv_h2h": nn.Conv2d(2, 8, 3)}
    tensors = {f"{name}.{key}": t for name, conv in lstm.items() for key, t in conv.state_dict().items()}
    torch.save({**tensors, **{f"conv_x2h.module.1.{key}": t for key, t in norm.items()}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"after conversion: tensor cell\.weight_x holds NaN"):
        step_model(load_checkpoint(tmp_path / "c.pth"))


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_in_a_list(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save({"net": weights(), "ema": [nested] * 4}, tmp_path / "c.pth")
    assert step_model(load_checkpoint(tmp_path / "c.pth"))[1] == "gru"
    torch.save({"other": nested, **weights()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="unexpected other"):
        load_weights(nn.GRU(3, 4), load_checkpoint(tmp_path / "c.pth"), "a module")


@pytest.mark.parametrize("value", [[0.1, 0.2], 3.0, "text"])
def test_an_entry_that_is_no_tensor(value: object, tmp_path: Path) -> None:
    conv = {f"conv{g}": nn.Conv2d(5, 2, 3) for g in "zrq"}
    tensors = nn.ModuleDict(conv).state_dict()
    torch.save({**tensors, "convz.bias": value}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=rf"no tensors: convz\.bias \({type(value).__name__}\)"):
        step_model(load_checkpoint(tmp_path / "c.pth"), "raft_convgru")
