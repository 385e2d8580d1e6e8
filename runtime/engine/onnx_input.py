"""The ONNX file a build starts from: read once, and checked before TensorRT sees it.

TensorRT's parser takes arbitrary bytes for an empty model, reports an operator it does not know
as a failed assertion, and in some setups ends the whole process on one; none of that may reach
a user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepcell.contract import METADATA_KEY, StepContract
from stepcell.dims import Dim, evaluate
from stepcell.errors import BuildError, ContractError
from stepcell.missing import require
from stepcell.onnx_model import read_model
from stepcell.plugins.fp16_mirrors import Fp16Mirror, engine_tensors
from stepcell.runtime.engine.tensorrt_module import dtype_name

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto

__all__ = ["OnnxFile", "check_graph", "check_network", "read_onnx"]

_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxFile:
    """A model with its contract.

    Attributes:
        data: what TensorRT parses.
        sha256: of the file.
        model: `data`, decoded.
        plugins: operators (domain, name) that a registered plugin takes.
        fp16_mirrors: inputs and outputs that `model` has beyond the contract, for the plugin.
    """

    path: Path
    data: bytes
    sha256: str
    model: ModelProto
    contract: StepContract
    plugins: frozenset[tuple[str, str]] = frozenset()
    fp16_mirrors: tuple[Fp16Mirror, ...] = ()


def read_onnx(path: Path) -> OnnxFile:
    """Read a model and the contract in its metadata.

    Raises:
        InputError: the file cannot be read or is not an ONNX model.
        ContractError: it holds no contract, or one that cannot be used.
    """
    data, model = read_model(path)
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        raise ContractError(
            f"{path}: has no state contract (metadata {METADATA_KEY!r}), so its states are unknown",
            hint="export it with `stepcell export`, which writes the contract into the file",
        )
    contract = StepContract.from_json(text, subject=f"{path}: contract")
    return OnnxFile(path, data, hashlib.sha256(data).hexdigest(), model, contract)


def check_graph(file: OnnxFile, supports: Callable[[str], bool]) -> None:
    """Refuse a model that TensorRT cannot take: an unknown operator, wherever it is nested; weights
    outside the file; an invalid graph.

    Args:
        supports: whether TensorRT's parser knows a standard operator.

    Raises:
        BuildError: names the node, its operator and the reason, or the weights.
    """
    onnx = require("onnx", extra="rtx", purpose="building an engine")
    external = [t.name for t in file.model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise BuildError(
            f"{file.path}: weights such as {external[0]!r} lie outside the file, where no fingerprint covers them",
            hint="save it as one file: onnx.save(onnx.load(path), path)",
        )
    functions: dict[tuple[str, str], FunctionProto] = {}
    for function in file.model.functions:
        if (function.domain, function.name) in functions:
            raise BuildError(
                f"{file.path}: function {function.domain}::{function.name} is defined twice; TensorRT "
                "ignores overloads and would use the first for every node"
            )
        functions[function.domain, function.name] = function
    for where, node in _walk(file.model.graph.node, functions, ()):
        domain, name = ("" if node.domain in _STANDARD else node.domain), node.op_type
        if (domain, name) in functions or (domain, name) in file.plugins or (not domain and supports(name)):
            continue
        reason = "TensorRT does not support this operator"
        if domain:
            reason = "it is no standard operator and the file holds no definition of it (model-local function)"
        raise BuildError(f"{file.path}: node {where}, operator {domain + '::' if domain else ''}{name}: {reason}")
    try:
        onnx.checker.check_model(file.model)
    except onnx.checker.ValidationError as error:
        raise BuildError(f"{file.path}: is not a valid ONNX model: {' '.join(str(error).split())}") from error


def _walk(
    nodes: Iterable[NodeProto], functions: dict[tuple[str, str], FunctionProto], outer: tuple[str, ...]
) -> Iterator[tuple[str, NodeProto]]:
    """Every node with its path, through subgraphs and function bodies."""
    for index, node in enumerate(nodes):
        path = (*outer, repr(node.name) if node.name else f"number {index}")
        yield " > ".join(path), node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node, functions, path)
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            if len(path) > 20:
                raise BuildError(f"function {node.op_type}: is nested more than 20 deep, or calls itself")
            yield from _walk(function.node, functions, path)


def check_network(network: Any, contract: StepContract, copies: Sequence[Fp16Mirror] = ()) -> None:
    """Compare what TensorRT parsed with the contract: names, dtypes, ranks and fixed sizes.

    Args:
        copies: what it has beyond the contract.

    Raises:
        ContractError: they differ.
    """
    inputs, outputs = engine_tensors(contract, copies)
    sides = (
        ("inputs", inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    )
    for side, specs, tensors in sides:
        names = [tensor.name for tensor in tensors]
        if sorted(names) != sorted(specs):
            raise ContractError(f"graph and contract differ in {side}: {', '.join(names)} against {', '.join(specs)}")
        for tensor in tensors:
            spec = specs[tensor.name]
            dtype = dtype_name(tensor.dtype)
            if dtype != spec.dtype:
                raise ContractError(f"{tensor.name}: {dtype} in TensorRT's network, {spec.dtype} in the contract")
            if not _fits(tuple(tensor.shape), spec.shape):
                raise ContractError(
                    f"{tensor.name}: shape {tuple(tensor.shape)} in TensorRT's network, {spec.shape} in the contract"
                )


def _fits(actual: tuple[int, ...], declared: tuple[Dim, ...]) -> bool:
    """Whether every size TensorRT knows (-1: dynamic) is the one the contract fixes."""
    if len(actual) != len(declared):
        return False
    return all(
        size == -1 or not isinstance(dim, int) or evaluate(dim, {}) == size
        for size, dim in zip(actual, declared, strict=True)
    )
