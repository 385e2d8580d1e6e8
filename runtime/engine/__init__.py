"""TensorRT engines: building them, and checking them before they are loaded."""
