"""TensorRT engines: building, and checking before they are loaded."""
