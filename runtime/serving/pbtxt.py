"""Text of a config.pbtxt: what a server of Triton reads about a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepcell.errors import StepcellError, UsageError

__all__ = ["check_name", "check_schema", "data_type", "listed", "quoted"]


def check_name(name: str) -> None:
    """Raise UsageError for a name of a model that Triton, or a shell, would not take."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) is None:
        raise UsageError(f"--name: expected letters, digits, '_', '.' and '-', got {name!r}")


def quoted(text: str) -> str:
    """A string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def listed(items: Sequence[str]) -> str:
    """Elements of a list, one a line."""
    return ",\n".join(f"  {item}" for item in items)


def data_type(dtype: str) -> str:
    """Name of an element type."""
    return "TYPE_" + ("STRING" if dtype == "str" else dtype.upper().replace("FLOAT", "FP"))


def check_schema(text: str) -> bool:
    """Compare a config.pbtxt with the server's own schema, which its client contains.

    Returns:
        False: it was not compared, because the client is not installed.

    Raises:
        StepcellError: it does not fit.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError):  # RuntimeError: the client without its part for gRPC
        return False
    try:
        text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise StepcellError(f"config.pbtxt: does not fit the schema of the server: {error}") from error
    return True
