"""int8 models whose states stay float32."""

from stepcell.exporter.quantize.quantize import quantize

__all__ = ["quantize"]
