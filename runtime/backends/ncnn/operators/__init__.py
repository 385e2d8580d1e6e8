"""ONNX operators as layers of ncnn."""

from stepcell.runtime.backends.ncnn.operators import arrangement, elementwise, normalization, windows
from stepcell.runtime.backends.ncnn.operators.registry import ANY_TYPE, WRITERS, Node

__all__ = ["ANY_TYPE", "WRITERS", "Node", "arrangement", "elementwise", "normalization", "windows"]
