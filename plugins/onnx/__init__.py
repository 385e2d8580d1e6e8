"""The ONNX model that TensorRT gets: nodes of the ops rewritten as plugin nodes."""
