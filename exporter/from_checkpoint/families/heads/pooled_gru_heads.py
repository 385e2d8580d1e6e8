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

# Sizes in the published examples; the tensors determine neither the map's height nor the number of regions.
_MAP_SIZE = (14, 14)
_REGIONS = 10


def _recognise(tensors: Tensors) -> dict[str, object]:
    found = GRU.recognise(tensors)
    unexpected = sorted(name for name in tensors if not name.startswith(("weight_ih_l", "weight_hh_l", "bias_")))
    if unexpected:
        raise NotThisFamily(f"unexpected tensor {unexpected[0]}")
    return found


def _build(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    head: Head = "gap",
    map_size: Sequence[int] = _MAP_SIZE,
    regions: int = _REGIONS,
) -> GRUHead:
    if len(map_size) != 2:
        raise ValueError(f"map_size: expected [height, width], got {map_size}")
    height, width = map_size
    return GRUHead(input_size, hidden_size, num_layers, head=head, map_size=(height, width), regions=regions)


def _convert(tensors: Tensors, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    del arguments
    return prefixed("cells", GRU.convert(tensors, GRU.recognise(tensors)))


def _from_shapes(shapes: Mapping[str, Sequence[int]], arguments: Mapping[str, Any]) -> dict[str, object]:
    x, indices = shapes.get("x", ()), shapes.get("roi_indices", ())
    if arguments.get("head") == "rows" and len(x) == 4:
        return {"map_size": list(x[2:])}
    if arguments.get("head") == "roi" and len(indices) == 2:
        return {"regions": indices[1]}
    return {}


FAMILY = Family(
    name="pooled_gru_heads",
    summary="torch.nn.GRU behind global average pooling, rows or regions of a feature map",
    recognise=_recognise,
    by_name=True,
    build=_build,
    convert=_convert,
    from_shapes=_from_shapes,
    arguments={
        "input_size": "features of the GRU: channels, for rows channels x width",
        "hidden_size": "features of the state",
        "num_layers": "number of stacked layers",
        "head": '"gap" (mean over the map), "rows" (a position per row) or "roi" (a position per region)',
        "map_size": f"rows: [height, width] of the feature map; by default that of --shape, or {list(_MAP_SIZE)}",
        "regions": f"roi: regions per frame; by default that of --shape, or {_REGIONS}",
    },
    ignored=("bias", "batch_first"),
)
