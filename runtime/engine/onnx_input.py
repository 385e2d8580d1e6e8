"""Checks of an ONNX model before TensorRT parses it, and of the network that it parsed.

TensorRT's parser accepts arbitrary bytes as an empty model, reports an unknown operator as a failed
assertion, and in some versions ends the whole process on one. These checks run first and name the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stepcell.contract import Spec
from stepcell.dims import Dim, evaluate
from stepcell.errors import BuildError, ContractError
from stepcell.external_weights import tensors_of
from stepcell.library_errors import library_errors
from stepcell.optional_imports import require
from stepcell.plugins.prepare import PreparedModel
from stepcell.runtime.engine.tensorrt_module import dtype_name

if TYPE_CHECKING:
    from onnx import FunctionProto, NodeProto

__all__ = ["check_graph", "check_network"]

_STANDARD = ("", "ai.onnx")


def check_graph(prepared: PreparedModel, supports: Callable[[str], bool]) -> None:
    """Refuse a model that TensorRT cannot take.

    Causes are an unknown operator, in subgraphs and function bodies too, weights outside the file, or an
    invalid graph.

    Args:
        prepared: what TensorRT is to parse.
        supports: whether TensorRT's parser supports a standard operator.

    Raises:
        BuildError: the message names the node, its operator and the reason, or the weights.
    """
    onnx = require("onnx", extra="rtx", purpose="building an engine")
    external = next((t.name for t in tensors_of(prepared.model) if t.data_location == onnx.TensorProto.EXTERNAL), None)
    if external is not None:
        raise BuildError(
            f"{prepared.path}: weights such as {external!r} are stored outside the file, which the fingerprint does "
            "not cover",
            hint="save it as one file: onnx.save(onnx.load(path), path)",
        )
    functions: dict[tuple[str, str], FunctionProto] = {}
    for function in prepared.model.functions:
        if (function.domain, function.name) in functions:
            raise BuildError(
                f"{prepared.path}: function {function.domain}::{function.name} is defined twice; TensorRT "
                "ignores overloads and would use the first definition for every node"
            )
        functions[function.domain, function.name] = function
    for where, node in _walk(prepared.model.graph.node, dict(functions), ()):
        domain, name = ("" if node.domain in _STANDARD else node.domain), node.op_type
        if (domain, name) in functions or (domain, name) in prepared.operators or (not domain and supports(name)):
            continue
        reason = "TensorRT does not support this operator"
        if domain:
            reason = "it is no standard operator and the file has no definition of it (model-local function)"
        raise BuildError(f"{prepared.path}: node {where}, operator {domain + '::' if domain else ''}{name}: {reason}")
    with library_errors(str(prepared.path), BuildError, what="is not a valid ONNX model"):
        onnx.checker.check_model(prepared.model)


def _walk(
    nodes: Iterable[NodeProto], unvisited: dict[tuple[str, str], FunctionProto], outer: tuple[str, ...]
) -> Iterator[tuple[str, NodeProto]]:
    """Iterate over all nodes with their path, through subgraphs and each function body once."""
    for index, node in enumerate(nodes):
        path = (*outer, repr(node.name) if node.name else f"number {index}")
        yield " > ".join(path), node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node, unvisited, path)
        function = unvisited.pop((node.domain, node.op_type), None)
        if function is not None:
            yield from _walk(function.node, unvisited, path)


def check_network(network: Any, prepared: PreparedModel) -> None:
    """Compare the network that TensorRT parsed with the contract: names, dtypes, ranks and fixed sizes.

    Raises:
        ContractError: they differ.
    """
    sides: tuple[tuple[str, Mapping[str, Spec], list[Any]], ...] = (
        ("inputs", prepared.inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", prepared.outputs, [network.get_output(i) for i in range(network.num_outputs)]),
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
    """Whether every fixed size in TensorRT's network (-1: dynamic) equals that of the contract."""
    if len(actual) != len(declared):
        return False
    return all(
        size == -1 or not isinstance(dim, int) or evaluate(dim, {}) == size
        for size, dim in zip(actual, declared, strict=True)
    )
