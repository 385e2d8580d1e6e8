"""Writes the files of a model repository, and nothing over files of others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from stepcell.errors import OutputError
from stepcell.files import atomic_path
from stepcell.overwrite import check_output, is_engine, is_exported_model, is_marked, referred_files

__all__ = ["write_files"]


def write_files(
    folder: Path, texts: Mapping[Path, str], *, source: Path, model: Path, data: Mapping[Path, bytes], overwrite: bool
) -> list[Path]:
    """Write texts, data and a copy of a model with the files that belong to it; returns their paths.

    Args:
        folder: of the repository, for messages.
        texts: with the mark of this program.
        source: the model.
        model: its copy.
        data: files that belong to the copy.
        overwrite: replace files of others.

    Raises:
        UsageError: there is a file that is not of this command.
        OutputError: the folder cannot be written.
    """
    copies = dict(_copies(source, model))
    reads: dict[str | Path, str] = {source: "the model"}
    for path in texts:
        check_output(path, is_marked, reads=reads, overwrite=overwrite)
    ours = is_exported_model(model) or is_engine(model)
    for path in (*copies, *data):
        check_output(path, lambda _path: ours, reads=reads, overwrite=overwrite)
    written = [*texts, *copies, *data]
    try:
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {folder}: cannot be written ({error.strerror})") from error
    for path, original in copies.items():
        with atomic_path(path) as temporary:
            shutil.copyfile(original, temporary)
    for path, content in data.items():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text)
            if path.suffix == ".sh":
                temporary.chmod(temporary.stat().st_mode | 0o111)
    return written


def _copies(source: Path, model: Path) -> Iterator[tuple[Path, Path]]:
    """Files of the model in the repository, and where they come from."""
    yield model, source
    for path in referred_files(source):  # weights beside it, or the sidecar of an engine
        if path.is_file() and path.suffix.lower() != ".onnx":
            yield model.parent / path.relative_to(source.parent), path
