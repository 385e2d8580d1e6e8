"""Integer inputs whose valid values nobody declared: the comparison gives them all, and an index may be too large."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stepcell.contract import StepContract
from stepcell.errors import ExportError, ParityError, StepcellError
from stepcell.sample_frames import undeclared_integers

__all__ = ["integers_explained"]


@contextlib.contextmanager
def integers_explained(contract: StepContract) -> Iterator[None]:
    """Raise what a model with such inputs raises in the block as an ExportError that says how to declare them."""
    try:
        yield
    except ParityError:
        raise
    except (StepcellError, IndexError, RuntimeError) as error:
        names = [spec.name for spec in undeclared_integers(contract.inputs)]
        if not names or (isinstance(error, StepcellError) and error.hint):
            raise
        text = error.message if isinstance(error, StepcellError) else f"the step fails: {type(error).__name__}: {error}"
        raise ExportError(
            text, hint=f"{names[0]} is of integers, which ones is not declared: --range {names[0]}:LOW,HIGH"
        ) from error
