"""Somebody else's ONNX file as a stepcell model: states paired, recurrent cells replaced by the ops."""
