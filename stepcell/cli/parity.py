"""The errors of a contract and their bound in words, for `export`, `fuse` and `inspect`."""

from __future__ import annotations

from stepcell.contract import Parity
from stepcell.runtime.verify.bound import never_forgets, remembers

__all__ = ["bound", "error_of"]


def bound(parity: Parity) -> str | None:
    """The error bound of a run of any length, or what it means that there is none; None: nothing was derived."""
    if parity.rho is None:
        return None
    if parity.memory is None:
        return f"no error bound exists: {never_forgets(parity.rho)}"
    memory = remembers(parity.rho, parity.memory)
    if parity.bound is None:
        return f"{memory}; no error bound: a state jumps where it is rounded the other way"
    limits = ", ".join(f"{name} {limit:.1e}" for name, limit in parity.bound.items())
    return f"{memory}; so the rms error stays below these however long the run is: {limits}"


def error_of(parity: Parity, name: str) -> str:
    """The worst error of an output or state: `y 1.2e-04`, or `y 1 in 0.02%` of the elements of integers."""
    error = parity.max_abs_error[name]
    if name not in parity.differing:
        return f"{name} {error:.1e}"
    return f"{name} {error:g} in {parity.differing[name]:.2%} of its elements" if error else f"{name} 0"
