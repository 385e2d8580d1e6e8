"""Adoption of a user's own module: states lifted, cells replaced by canonical ones, compared."""

from stepcell.exporter.from_module.adoption import adopt
from stepcell.exporter.from_module.model import AdoptedModel
from stepcell.exporter.from_module.registry import register_cell

__all__ = ["AdoptedModel", "adopt", "register_cell"]
