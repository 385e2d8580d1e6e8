"""ncnn back end: steps the float32 form of an ONNX file on a CPU, with Winograd convolutions."""
