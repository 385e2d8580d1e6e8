"""Adoption of a user's own module: states lifted, cells replaced by canonical ones, compared."""

from stepcell.exporter.adopt.adoption import adopt
from stepcell.exporter.adopt.model import AdoptedModel
from stepcell.exporter.adopt.registry import register_cell

__all__ = ["AdoptedModel", "adopt", "register_cell"]
