"""A row of the table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What was promised, and what was seen.

    Attributes:
        name: the scenario.
        promised: what docs/fleet.md says.
        seen: what came out.
        broken: a line for each time the promise did not hold.
    """

    name: str
    promised: str
    seen: str = ""
    broken: list[str] = field(default_factory=list)

    def require(self, holds: bool, otherwise: str) -> None:
        """Note that the promise did not hold."""
        if not holds:
            self.broken.append(otherwise)
