"""Recogniser of recurrent cells in ONNX graphs, and their replacement by the ops."""
