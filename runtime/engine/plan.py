"""Build of a plan, the same for both flavours of TensorRT: parse, check, set the sizes, build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepcell.errors import BuildError
from stepcell.plugins.prepare import PreparedModel
from stepcell.runtime.engine.layer_check import check_layers
from stepcell.runtime.engine.layers import EngineLayer, layers_of_log
from stepcell.runtime.engine.onnx_input import check_graph, check_network
from stepcell.runtime.engine.options import BuildOptions
from stepcell.runtime.engine.profile import Profile, engine_profiles
from stepcell.runtime.engine.tensorrt_module import Messages, TensorRT, dtype_name, make_logger, no_collection

__all__ = ["BuiltPlan", "build_plan"]

_COMPUTE_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


@dataclass(frozen=True)
class BuiltPlan:
    """A plan and what is known about it.

    Attributes:
        data: the serialised engine.
        compute_layers: convolutions and matrix products by the dtype they compute in.
        timing_cache: kernel timings to keep for the next build; None: none were asked for.
        warnings: TensorRT's warnings, each once.
        source: the model it was built from.
        profiles: size ranges of every input of the engine.
        layers: layers of the engine, with their dtypes; none, where TensorRT did not list them.
    """

    data: bytes
    compute_layers: dict[str, int]
    timing_cache: bytes | None
    warnings: tuple[str, ...]
    source: PreparedModel
    profiles: Mapping[str, Profile]
    layers: tuple[EngineLayer, ...] = ()


@no_collection()
def build_plan(
    library: TensorRT,
    prepared: PreparedModel,
    profiles: Mapping[str, Profile],
    options: BuildOptions,
    timing_cache: bytes | None,
) -> BuiltPlan:
    """Parse a model and build its plan.

    Args:
        profiles: size ranges of the contract's inputs.
        timing_cache: timings of earlier builds, empty for none yet; None: keep none.

    Raises:
        BuildError: TensorRT refuses an operator, the graph or the sizes, reads a node as another one, or builds no
            engine.
        ContractError: the parsed network does not match the contract.
    """
    trt, messages = library.module, Messages()
    logger = make_logger(trt, messages, verbose=options.verbose)
    builder = trt.Builder(logger)
    # The graph decides about precision. TensorRT versions without this flag (11 and later) are always strongly typed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    check_graph(prepared, parser.supports_operator)
    if not parser.parse(prepared.data):
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(
            f"{prepared.path}: {library.name} refused the model: {'; '.join(reasons) or messages.explain()}"
        )
    check_network(network, prepared)
    check_layers(trt, network, prepared)
    _fix_formats(trt, network, prepared.channels_last)
    config = _configure(trt, builder, options)
    if library.is_rtx and options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, target in enumerate(options.compute_capabilities):
            capability = getattr(trt.ComputeCapability, "SM" + target.replace(".", ""))
            _require(config.set_compute_capability(capability, index), f"compute capability {target}", messages)
    all_profiles = engine_profiles(profiles, prepared.inputs)
    if any(isinstance(dim, str) for spec in prepared.inputs.values() for dim in spec.shape):
        profile = builder.create_optimization_profile()
        for name, shapes in all_profiles.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        _require(config.add_optimization_profile(profile) >= 0, "the sizes", messages)
    if timing_cache is not None:
        timing = config.create_timing_cache(timing_cache)
        if not config.set_timing_cache(timing, ignore_mismatch=False):  # from another device: start with an empty one
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{prepared.path}: {library.name} {library.version} built no engine: {messages.explain()}")
    if timing_cache is not None:
        timing_cache = bytes(config.get_timing_cache().serialize())
    warnings = tuple(dict.fromkeys(messages.warnings))
    layers = layers_of_log(messages.layers[0]) if messages.layers else ()
    return BuiltPlan(bytes(plan), _compute_layers(network), timing_cache, warnings, prepared, all_profiles, layers)


def _fix_formats(trt: Any, network: Any, channels_last: frozenset[str]) -> None:
    """Bind these tensors in the format that the kernels read and write, so that TensorRT adds no conversion."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.name in channels_last:
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC8)


def _configure(trt: Any, builder: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    # By default TensorRT computes float32 convolutions in TF32, with a 10-bit mantissa like float16. A model that was
    # exported as float32 is meant to compute in float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    # TensorRT lists the layers of the engine with their dtypes only then: in the log, and for the engine inspector.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    return config


def _compute_layers(network: Any) -> dict[str, int]:
    """Number of convolutions and matrix products by dtype.

    Taken from the strongly typed network, whose types TensorRT may not change; inspecting the engine needs a GPU.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return dict(Counter(dtype_name(layer.get_output_type(0)) for layer in layers if layer.type.name in _COMPUTE_LAYERS))


def _parser_error(error: Any) -> str:
    """Format an error of the ONNX parser: node, operator and reason."""
    names = [*error.local_function_stack(), *([error.node_name()] if error.node_name() else [])]
    node = f"node {' > '.join(names)}, " if names else ""
    operator = f"operator {error.node_operator()}: " if error.node_operator() else ""
    lines = [line for line in error.desc().splitlines() if "catchCudaError" not in line]
    return node + operator + " ".join(" ".join(lines).split())


def _require(accepted: bool, what: str, messages: Messages) -> None:
    if not accepted:
        raise BuildError(f"TensorRT refused {what}: {messages.explain()}")
