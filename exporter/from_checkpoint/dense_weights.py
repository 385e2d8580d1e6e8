"""Check that a checkpoint's tensors are weights that can be computed with: dense, in memory, of a floating dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepcell.errors import CheckpointError

__all__ = ["DTYPES", "check_finite", "dense_weights", "first_problem"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT = "export the float checkpoint it was made from"
_COUNTERS = ("num_batches_tracked", "n_averaged")  # integers that are no weights
_DIVERGED = "the training diverged; use an earlier checkpoint"
_LARGEST = torch.finfo(torch.float32).max


def dense_weights(
    tensors: Mapping[str, Tensor], subject: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors, contiguous and without gradients.

    Args:
        subject: the file, for messages.
        like: tensors of the module that they are loaded into: where it has an integer or a bool, so may the checkpoint.
            By default only counters are no weights.

    Raises:
        CheckpointError: names the first tensor that is none: of another dtype, quantised, sparse, without values, of a
            subclass, or holding NaN, infinity or more than float32 can.
    """
    checked = {}
    for name, tensor in tensors.items():
        if problem := _problem(name, tensor, None if like is None else like.get(name)):
            what, remedy = problem
            raise CheckpointError(f"{subject}: tensor {name}: {what}", hint=remedy)
        checked[name] = tensor.detach().resolve_neg().contiguous()
    check_finite(checked, subject)
    return checked


def first_problem(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Name of the first tensor that is no weight, and what it is; None if all are weights."""
    problems = ((name, _problem(name, tensor, None)) for name, tensor in tensors.items() if tensor.dim())
    return next(((name, problem[0]) for name, problem in problems if problem), None)


def check_finite(tensors: Mapping[str, Tensor], subject: str) -> None:
    """Raise CheckpointError if a floating tensor holds NaN, infinity, or a float64 beyond float32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
            continue
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{subject}: tensor {name} holds NaN or infinity",
                hint=_DIVERGED,
            )
        if tensor.dtype == torch.float64 and tensor.numel() and (largest := tensor.abs().max()) > _LARGEST:
            raise CheckpointError(
                f"{subject}: tensor {name} holds {largest:.3g}, beyond float32's largest value {_LARGEST:.3g}",
                hint=_DIVERGED,
            )


def _problem(name: str, tensor: Tensor, like: Tensor | None) -> tuple[str, str] | None:
    """What is wrong with a tensor and what to do; None if nothing is."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(tensor).__name__}, not a plain tensor", "save .to_dense() or .full_tensor() of it"
    if tensor.is_quantized:
        return f"quantised ({_short(tensor.dtype)})", f"{_FLOAT}, or save .dequantize() of it"
    if tensor.is_nested:
        return "a nested tensor, which has no single shape", "save its parts"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})", "save .to_dense() of it"
    if tensor.is_meta:
        return "on the meta device: it has a shape but no values", "save the model after its weights were loaded"
    if tensor.numel() == 0:
        return f"has no elements, shape {tuple(tensor.shape)}", "save the model after its layers have their sizes"
    if like is not None and tensor.dtype != like.dtype and not (tensor.dtype in DTYPES and like.is_floating_point()):
        if not _is_number(tensor) and not _is_number(like):  # an index of another width
            return None
        return f"dtype {_short(tensor.dtype)}, the module has {_short(like.dtype)} there", _remedy(tensor)
    if like is not None or tensor.dtype in DTYPES or name.rpartition(".")[2] in _COUNTERS:
        return None
    dtypes = ", ".join(map(_short, DTYPES))
    return f"dtype {_short(tensor.dtype)} is none of weights ({dtypes})", _remedy(tensor)


def _remedy(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex weights cannot be exported; save real and imaginary part as tensors of your own module"
    if tensor.dtype in DTYPES:
        return "save the module that is exported"
    if tensor.is_floating_point():
        return "multiply it with its scale and save the result in float32"
    return f"it is quantised, or a mask or an index: {_FLOAT}"


def _is_number(tensor: Tensor) -> bool:
    """Whether it is real or complex, not an integer or bool."""
    return tensor.is_floating_point() or tensor.is_complex()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
