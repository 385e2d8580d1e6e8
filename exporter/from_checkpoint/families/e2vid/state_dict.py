"""Reader of rpg_e2vid state_dicts (E2VID and FireNet): layers, norms, recurrent blocks."""

from __future__ import annotations

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.weights import (
    Gate,
    blocks,
    fold_norm,
    gru_tensors,
    lstm_tensors,
    prefixed,
)
from stepcell.models.published.e2vid_blocks import BlockType

__all__ = ["Reader", "block_type_of", "count", "has_frame_norm", "norm_of"]


class Reader:
    """Converts the tensors of an E2VID state_dict one module at a time; `finish` checks that none is left over.

    Args:
        prefix: start of every name.
        norm: upstream's argument `norm`.
    """

    def __init__(self, tensors: Tensors, prefix: str, norm: object) -> None:
        # Counts of training batches are not used in eval mode.
        self._tensors = {name: t for name, t in tensors.items() if not name.endswith(".num_batches_tracked")}
        self._prefix = prefix
        self._norm = None if norm == "none" else norm

    def conv(self, name: str) -> dict[str, Tensor]:
        """A plain convolution."""
        return {"weight": self._take(f"{name}.weight").float(), "bias": self._take(f"{name}.bias").float()}

    def layer(self, name: str, *, conv: str = "conv2d", outputs_axis: int = 0) -> dict[str, Tensor]:
        """A convolution with the statistics of its norm folded in."""
        if self._norm is None:
            return self.conv(f"{name}.{conv}")
        return self._folded(f"{name}.{conv}", f"{name}.norm_layer", outputs_axis)

    def residual(self, name: str) -> dict[str, Tensor]:
        """Both convolutions of a residual block. Its "IN" keeps no statistics and stays in the graph."""
        found = {}
        for index in (1, 2):
            conv = f"{name}.conv{index}"
            tensors = self._folded(conv, f"{name}.bn{index}", 0) if self._norm == "BN" else self.conv(conv)
            found.update(prefixed(f"conv{index}", tensors))
        return found

    def cell(self, name: str, kind: object) -> dict[str, Tensor]:
        """A recurrent block: x before h, the LSTM packs i, f, o, g, the GRU's update gate weighs the candidate."""
        if kind == "convlstm":
            return lstm_tensors(*blocks(self._gate(f"{name}.Gates"), 4))
        return gru_tensors(*(self._gate(f"{name}.{gate}") for gate in ("update_gate", "reset_gate", "out_gate")))

    def finish(self) -> None:
        """Raise ValueError if a tensor has not been read."""
        if self._tensors:
            raise ValueError(f"tensor {min(self._tensors)} is not part of a model with these arguments")

    def _take(self, name: str) -> Tensor:
        try:
            return self._tensors.pop(self._prefix + name)
        except KeyError:
            raise ValueError(f"no tensor {self._prefix}{name}, which a model with these arguments has") from None

    def _gate(self, name: str) -> Gate:
        return self._take(f"{name}.weight"), self._take(f"{name}.bias")

    def _folded(self, conv: str, norm: str, outputs_axis: int) -> dict[str, Tensor]:
        names = ("running_mean", "running_var", *(("weight", "bias") if self._norm == "BN" else ()))
        weight = self._take(f"{conv}.weight")
        # In front of a BatchNorm upstream has no bias.
        bias = (
            self._tensors.pop(f"{self._prefix}{conv}.bias", None) if self._norm == "BN" else self._take(f"{conv}.bias")
        )
        statistics = {name: self._take(f"{norm}.{name}") for name in names}
        folded = fold_norm((weight, bias), statistics, outputs_axis=outputs_axis)
        return dict(zip(("weight", "bias"), folded, strict=True))


def count(tensors: Tensors, prefix: str) -> int:
    """Number of numbered modules under `prefix.`."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in tensors if name.startswith(prefix + ".")})


def block_type_of(tensors: Tensors, name: str) -> BlockType:
    """Type of the recurrent block `name`, from its tensors."""
    if f"{name}.Gates.weight" in tensors:
        return "convlstm"
    if f"{name}.update_gate.weight" in tensors:
        return "convgru"
    raise NotThisFamily(f"no tensor {name}.Gates.weight and no {name}.update_gate.weight")


def norm_of(tensors: Tensors, layer: str) -> str | None:
    """Norm of a layer, from its tensors: "IN" has statistics but no weight."""
    if f"{layer}.norm_layer.running_mean" not in tensors:
        return None
    return "BN" if f"{layer}.norm_layer.weight" in tensors else "IN"


def has_frame_norm(norm: str | None) -> bool:
    """Whether residual blocks normalise with the statistics of the current frame.

    Raises:
        ValueError: an unknown norm.
    """
    if norm not in (None, "none", "BN", "IN"):
        raise ValueError(f"norm: expected 'BN', 'IN' or null, got {norm!r}")
    return norm == "IN"
