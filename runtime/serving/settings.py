"""What `stepcell triton-repo` decided, in the parameters of a model's config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from stepcell.errors import InputError

__all__ = ["Settings"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a served model.

    Attributes:
        model: name of the file, beside model.py.
        slots: streams of one instance.
        device: "cpu", "cuda" (the one of the instance) or "cuda:N".
        pixels: frames are pixels, else the model's tensors.
        idle: seconds after which a stream without frames may be evicted.
        snapshots: folder; empty: none are written.
        snapshot_every: frames from one to the next.
        keep: seconds after which an old snapshot is removed.
    """

    model: str
    slots: Annotated[int, msgspec.Meta(ge=1)]
    device: str = "cpu"
    pixels: bool = True
    idle: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    snapshots: str = ""
    snapshot_every: Annotated[int, msgspec.Meta(ge=1)] = 30
    keep: Annotated[float, msgspec.Meta(gt=0)] = 86400.0

    def parameters(self) -> dict[str, str]:
        """As text, for config.pbtxt."""
        values = msgspec.structs.asdict(self)
        if not self.snapshots:
            del values["snapshots"], values["snapshot_every"], values["keep"]
        return {name: str(value) for name, value in values.items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Settings:
        """From the parameters of a model's configuration.

        Raises:
            InputError: one is missing or malformed.
        """
        values = {name: value["string_value"] for name, value in parameters.items()}
        try:
            return msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise InputError(f"parameters of config.pbtxt: {error}") from error
