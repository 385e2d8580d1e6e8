"""Update blocks of RAFT (Teed and Deng 2020, arXiv 2003.12039): one iteration is one step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, Tensors, check_names, weight_and_bias
from stepcell.exporter.from_checkpoint.families.raft.convgru import cell_tensors, separable_tensors
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.raft import BasicUpdateBlock, SmallUpdateBlock

__all__ = ["FAMILY"]

# Name of a convolution upstream, and ours, for each block.
_COMMON = {
    "encoder.convc1": "corr_convs.0",
    "encoder.convf1": "flow_convs.0",
    "encoder.convf2": "flow_convs.2",
    "encoder.conv": "motion.0",
    "flow_head.conv1": "flow_head.0",
    "flow_head.conv2": "flow_head.2",
}
_CONVS = {
    "BasicUpdateBlock": {
        **_COMMON,
        "encoder.convc2": "corr_convs.2",
        "mask.0": "mask_head.0",
        "mask.2": "mask_head.2",
    },
    "SmallUpdateBlock": _COMMON,
}
_GATES = {
    "BasicUpdateBlock": [f"gru.conv{letter}{half}" for half in "12" for letter in "zrq"],
    "SmallUpdateBlock": [f"gru.conv{letter}" for letter in "zrq"],
}


def _recognise(tensors: Tensors) -> dict[str, object]:
    target = "BasicUpdateBlock" if "encoder.convc2.weight" in tensors else "SmallUpdateBlock"
    convs = [*_CONVS[target], *_GATES[target]]
    check_names(tensors, weight_and_bias(convs))
    planes = tensors["encoder.convc1.weight"].shape[1]
    # The tensors only determine levels * (2 radius + 1)^2; the largest radius that divides it is assumed.
    radius = max(r for r in range(planes) if planes % (2 * r + 1) ** 2 == 0)
    return {
        "target": target,
        "hidden_dim": len(tensors[f"{_GATES[target][0]}.weight"]),
        "corr_levels": planes // (2 * radius + 1) ** 2,
        "corr_radius": radius,
    }


def _build(
    target: str, corr_levels: int, corr_radius: int, hidden_dim: int | None = None
) -> BasicUpdateBlock | SmallUpdateBlock:
    planes = corr_levels * (2 * corr_radius + 1) ** 2
    if target == "SmallUpdateBlock":
        return SmallUpdateBlock(planes, 96 if hidden_dim is None else hidden_dim)
    if target != "BasicUpdateBlock":
        raise ValueError(f"target: expected BasicUpdateBlock or SmallUpdateBlock, got {target}")
    if hidden_dim not in (None, 128):
        raise ValueError(
            f"hidden_dim: expected 128 in a BasicUpdateBlock (its mask reads 128 channels), got {hidden_dim}"
        )
    return BasicUpdateBlock(planes, 128)


def _convert(tensors: Tensors, arguments: Mapping[str, object]) -> dict[str, Tensor]:
    target = str(arguments["target"])
    converted = {
        f"{ours}.{part}": tensors[f"{theirs}.{part}"]
        for theirs, ours in _CONVS[target].items()
        for part in ("weight", "bias")
    }
    gru = separable_tensors(tensors, "gru.") if target == "BasicUpdateBlock" else cell_tensors(tensors, "gru.")
    return {**converted, **prefixed("cell", gru)}


FAMILY = Family(
    name="raft_update_block",
    summary="BasicUpdateBlock and SmallUpdateBlock of RAFT (princeton-vl/RAFT, core/update.py)",
    recognise=_recognise,
    build=_build,
    convert=_convert,
    arguments={
        "target": "BasicUpdateBlock or SmallUpdateBlock",
        "hidden_dim": "channels of net; 128 in a BasicUpdateBlock",
        "corr_levels": "levels of the correlation pyramid",
        "corr_radius": "radius of the lookup in each level",
    },
    ignored=("input_dim",),  # upstream does not use it either
)
