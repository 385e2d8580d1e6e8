"""torch.nn.GRU on a CNN's feature map: global average pooling, rows of the map, regions of interest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stepcell.exporter.from_checkpoint.families.family import Family, NotThisFamily, Tensors
from stepcell.exporter.from_checkpoint.families.torch_rnn import GRU
from stepcell.exporter.from_checkpoint.families.weights import prefixed
from stepcell.models.published.heads import GRUHead, Head

__all__ = ["FAMILY"]

# Of the examples: the tensors hold neither the height of the map nor the number of regions.
_MAP_SIZE = (14, 14)
_REGIONS = 10


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = GRU.recognise(tensors)
    foreign = sorted(name for name in tensors if not name.startswith(("weight_ih_l", "weight_hh_l", "bias_")))
    if foreign:
        raise NotThisFamily(f"has a tensor {foreign[0]}")
    return found


def _build(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = True,
    head: Head = "gap",
    map_size: Sequence[int] = _MAP_SIZE,
    regions: int = _REGIONS,
) -> GRUHead:
    del bias, batch_first  # a layer without bias converts to a zero one; a step has no such axis order
    if len(map_size) != 2:
        raise ValueError(f"map_size: expected [height, width], got {map_size}")
    height, width = map_size
    return GRUHead(input_size, hidden_size, num_layers, head=head, map_size=(height, width), regions=regions)


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    known = {name: arguments[name] for name in ("input_size", "hidden_size")}
    layers = {"num_layers": arguments.get("num_layers", 1), "bias": "bias_ih_l0" in tensors}
    return prefixed("cells", GRU.convert(tensors, {**known, **layers}))


def _from_shapes(shapes: Mapping[str, Sequence[int]], arguments: Mapping[str, Any]) -> dict[str, object]:
    x, indices = shapes.get("x", ()), shapes.get("roi_indices", ())
    if arguments.get("head") == "rows" and len(x) == 4:
        return {"map_size": list(x[2:])}
    if arguments.get("head") == "roi" and len(indices) == 2:
        return {"regions": indices[1]}
    return {}


FAMILY = Family(
    name="seed000_gru_heads",
    summary="torch.nn.GRU behind global average pooling, rows or regions of a feature map",
    recognise=_recognise,
    by_name=True,
    build=_build,
    convert=_convert,
    from_shapes=_from_shapes,
    arguments={
        "input_size": "features of the GRU: channels, for rows channels x width",
        "hidden_size": "features of the state",
        "num_layers": "layers on top of each other",
        "bias": "whether the layers have biases",
        "batch_first": "axis order of upstream's sequences; no effect here",
        "head": '"gap" (mean over the map), "rows" (a position per row) or "roi" (a position per region)',
        "map_size": f"rows: [height, width] of the feature map; that of --shape, or {list(_MAP_SIZE)}",
        "regions": f"roi: regions per frame; that of --shape, or {_REGIONS}",
    },
)
