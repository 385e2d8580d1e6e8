"""Conversion of pixels inside the graph: bytes in, bytes out."""
