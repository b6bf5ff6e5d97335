"""The folder of the ONNX model files: what it must be, and how the files get there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_lightning.utils.files import atomic_directory

#: The graph, and the weights it names; Netron and onnxruntime look for the second in the folder of the first.
MODEL_FILE = "__model__"
PARAMS_FILE = "__params__"


def check_directory(directory: Path) -> Path:
    """The absolute path of a folder; it is there and writable, or can be made, and no symbolic link leads to it.

    Raises:
        ValueError: it is something else.
    """
    given = Path.cwd() / directory
    for part in (given, *given.parents):  # before a ".." hides one
        if part.is_symlink():
            # onnxruntime refuses weights that a link leads out of the graph's folder.
            raise ValueError(
                f"export: the directory must not be reached through a symbolic link, got {directory} ({part} is one); "
                f"use {given.resolve()}"
            )
    path = Path(os.path.abspath(given))
    for name in (MODEL_FILE, PARAMS_FILE):
        if (path / name).is_symlink() or (path / name).is_dir():
            raise ValueError(f"export: {name} must be a plain file, got a link or folder {path / name}; remove it")
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"export: the directory must be a folder, got the file {existing}; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"export: the directory must be writable, got {existing} without permission; choose another")
    return path


@contextmanager
def model_directory(directory: Path) -> Iterator[Path]:
    """An empty folder to write the model files into; on leaving without an error they move to `directory`.

    Raises:
        ValueError: they cannot be written.
    """
    directory = check_directory(directory)
    try:
        with atomic_directory(directory, MODEL_FILE) as folder:
            yield folder
    except OSError as error:
        raise ValueError(
            f"export: the model files must fit on the disk and be allowed there, got {error.strerror or error} "
            f"writing to {directory}; nothing was left there"
        ) from error
