"""The ONNX operators that can be evaluated, by subject."""

from stepcell.runtime.evaluate.operators import (
    control,
    convolution,
    elementwise,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
    selection,
    shapes,
)
from stepcell.runtime.evaluate.registry import OPERATORS

__all__ = ["OPERATORS"]

_MODULES = (  # each enters its operators when it is imported
    control,
    convolution,
    elementwise,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
    selection,
    shapes,
)
