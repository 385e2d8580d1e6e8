"""stepcell: recurrent vision models as single-step ONNX files, TensorRT engines and a step loop."""

import logging

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library is quiet until its user listens
