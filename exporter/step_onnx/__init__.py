"""Export of step models to ONNX: tracing, op functions, contract, check."""
