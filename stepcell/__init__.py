"""stepcell: recurrent vision models as single-step ONNX files, TensorRT engines and a step loop."""

__version__ = "0.1.0"
