"""Export of a step model to a checked single-step ONNX file."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import msgspec
import onnx
import torch
from torch import nn

from stepcell import __version__
from stepcell.contract import StepContract
from stepcell.errors import ExportError, ParityError, UsageError
from stepcell.exporter.declared_range import warn_of_range
from stepcell.exporter.parity import Seen
from stepcell.exporter.step_onnx.check import check_export
from stepcell.exporter.step_onnx.contract import contract_for
from stepcell.exporter.step_onnx.fixed_sizes import fixed_sizes
from stepcell.exporter.step_onnx.graph import attach_functions, embed_contract, tidy
from stepcell.exporter.step_onnx.pixels_in_graph.check import with_pixels_in_graph
from stepcell.exporter.step_onnx.pixels_in_graph.convert import inputs_to_convert
from stepcell.exporter.step_onnx.plain import plain_graph
from stepcell.exporter.step_onnx.precision import in_precision
from stepcell.exporter.step_onnx.trace import onnx_from_module
from stepcell.exporter.undeclared_integers import integers_explained
from stepcell.files import atomic_path
from stepcell.models.step import StepModule, is_step_module
from stepcell.overwrite import check_output, is_exported_model
from stepcell.pixels import Declaration, PixelDType, changes, declare

logger = logging.getLogger(__name__)

__all__ = ["DEFAULT_OPSET", "OPSETS", "export_onnx"]

DEFAULT_OPSET = 20
OPSETS = range(18, 24)  # 18 is the first with the Split of the op functions


@runtime_checkable
class RewritesGraph(Protocol):
    """A step model that changes its traced graph before it is written, such as a lifted one (`from_module`)."""

    def rewrite_graph(self, model: onnx.ModelProto, contract: StepContract) -> tuple[onnx.ModelProto, StepContract]: ...


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    precision: Literal["float16", "float32"] = "float16",
    state_dtype: Literal["float32", "float16"] = "float32",
    shapes: Mapping[str, Sequence[int]] | None = None,
    dynamic: Sequence[str] = (),
    pixels: Declaration | None = None,
    pixel_dtype: PixelDType = "float",
    opset: int = DEFAULT_OPSET,
    plain: bool = False,
    family: str = "module",
    source: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> StepContract:
    """Export a step model; the file is written only if it equals the module.

    Args:
        model: a step model (`stepcell.models.StepModule`); it is not changed.
        path: the ONNX file to write.
        precision: compute dtype of weights, convolutions and data inputs and outputs.
        state_dtype: dtype of the states between steps. A float16 state stalls: updates smaller than
            its last bit are lost.
        shapes: sizes by data input; a symbol they bind is fixed unless named in `dynamic`.
        dynamic: symbols that stay dynamic although `shapes` binds them.
        pixels: what the values of pictures are, in place of what the model says: a `Pixels` for every picture, or by
            name of an input or output.
        pixel_dtype: "uint8" puts the conversion of pixels into the graph: pictures go in and come out as bytes
            (batch, height, width, channels), and each output picture has the mean of its values beside it. An `Nv12`
            does the same, and inputs of three channels are NV12 of this matrix and range.
        opset: ONNX opset, 18 to 23.
        plain: write cells in standard operators, for runtimes that take no functions (docs/interop.md).
        family: name of the model family, recorded in the contract.
        source: where the weights come from (checkpoint hash, arguments), recorded in the contract.
        overwrite: replace an existing file that is no exported model.

    Returns:
        The contract as written into the file, with the errors of the comparison and their bound.

    Raises:
        UsageError: sizes, symbols, pixels or opset that do not fit, no input that is a picture of which bytes can be
            made, or a foreign file at `path`.
        ExportError: the module cannot be traced, or the result is not a valid model.
        ParityError: the file computes something else than the module, or errs more than its rounding explains.
        OutputError: the file cannot be written.
    """
    if not is_step_module(model):
        raise ExportError(
            f"{type(model).__name__}: not a step model: needs inputs, outputs, states and forward(x..., *states)",
            hint="see docs/export.md, 'Your own module'",
        )
    assert isinstance(model, StepModule)
    if opset not in OPSETS:
        raise UsageError(f"--opset: expected {OPSETS.start} to {OPSETS.stop - 1}, got {opset}")
    path = Path(path)
    check_output(path, is_exported_model, reads={}, overwrite=overwrite)
    own = contract_for(model, precision=precision, state_dtype=state_dtype, shapes=shapes or {}, dynamic=dynamic)
    contract = declare(own, pixels)
    for change in changes(own, contract):
        logger.info(f"pixels:  {change}")
    if pixel_dtype != "float":
        inputs_to_convert(contract, pixel_dtype)  # before the work
    with atomic_path(path) as temporary:  # first, so that an invalid path is reported before the work
        # functions and parts of the module under torch.compile run as they are written
        with torch.compiler.set_stance("force_eager"), _fixed_sizes_named():
            proto, contract = _onnx_and_contract(
                copy.deepcopy(model).float().eval(),
                contract,
                opset,
                family,
                plain,
                {**(source or {}), "stepcell": __version__, "torch": str(torch.__version__), "opset": opset},
                declared=bool(pixels),
            )
            if pixel_dtype != "float":
                proto, contract = with_pixels_in_graph(proto, contract, pixel_dtype)
        temporary.write_bytes(proto.SerializeToString())
    return contract


@contextlib.contextmanager
def _fixed_sizes_named() -> Iterator[None]:
    """An export that fails after the code made a number of a dynamic size says so, and where."""
    with fixed_sizes() as places:
        try:
            yield
        except (ExportError, ParityError) as error:
            if not places:
                raise
            where = ", ".join(dict.fromkeys(places))
            hint = (
                f"{where}: len(x), and int(), round() and range() of a size, give that of the example, which the file "
                "then has at every size: write x.shape[0] or x.shape[2] // 2, or fix it: --shape without --dynamic"
            ) + (f"; otherwise: {error.hint}" if error.hint else "")
            raise type(error)(error.message, hint=hint) from error


def _onnx_and_contract(
    model: nn.Module,
    contract: StepContract,
    opset: int,
    family: str,
    plain: bool,
    source: dict[str, object],
    *,
    declared: bool,
) -> tuple[onnx.ModelProto, StepContract]:
    contract = msgspec.structs.replace(contract, family=family, source=source)
    proto = onnx_from_module(in_precision(model, contract), contract, opset)
    if isinstance(model, RewritesGraph):
        proto, contract = model.rewrite_graph(proto, contract)
    tidy(proto, contract)
    contract = attach_functions(proto, contract)
    if plain:
        proto, contract = plain_graph(proto, contract)
    embed_contract(proto, contract)
    _check_valid(proto)
    seen: Seen = {}
    with integers_explained(contract):
        parity = check_export(model, proto.SerializeToString(), contract, seen=seen)
    if declared:
        warn_of_range(contract, seen)
    return proto, embed_contract(proto, msgspec.structs.replace(contract, parity=parity))


def _check_valid(proto: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not a valid ONNX model: {error}") from error
