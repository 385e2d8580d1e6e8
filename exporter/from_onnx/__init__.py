"""ONNX files of other programs as step models: states are paired, recurrent cells replaced by the ops."""
