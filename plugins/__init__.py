"""The fused gate kernels as a TensorRT plugin.

prepare.py is the facade for engine builds and fp16_mirrors.py the data that an engine with the plugin needs at run
time. kernels/ has the Triton sources, their compiler and the packed weights, onnx/ the rewritten ONNX nodes,
tensorrt/ the plugin's classes. docs/plugin.md explains the whole.
"""
