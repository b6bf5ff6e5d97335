"""The folder of an exported pair: what it must be, and how the pair gets there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_lightning.training.checkpoint_io import sync

#: The graph, and the weights it names; Netron and onnxruntime find the second beside the first.
MODEL_FILE = "__model__"
PARAMS_FILE = "__params__"


def check_directory(directory: Path) -> None:
    """Raise ValueError unless `directory` is, or can become, a writable folder that no symbolic link leads to."""
    path = Path(os.path.abspath(directory))
    for part in (path, *path.parents):
        if part.is_symlink():
            # onnxruntime refuses weights that a link leads out of the graph's folder.
            raise ValueError(
                f"export: the directory must not lie behind a symbolic link, got {directory} ({part} is one); "
                f"use {path.resolve()}"
            )
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


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """An empty folder to write the pair into; on leaving it without an error the pair moves to `directory`.

    At no moment does a graph stand beside weights that are not its own. What cannot be written is a ValueError.
    """
    check_directory(directory)
    directory = Path(os.path.abspath(directory))
    made = [part for part in (directory, *directory.parents) if not part.exists()]
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=directory))  # one file system, so renames are atomic
        yield temporary
        for name in (MODEL_FILE, PARAMS_FILE):
            sync(temporary / name)
        (directory / MODEL_FILE).unlink(missing_ok=True)
        os.replace(temporary / PARAMS_FILE, directory / PARAMS_FILE)
        os.replace(temporary / MODEL_FILE, directory / MODEL_FILE)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # another's files came in between: they stay
            for folder in filter(Path.exists, made):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ValueError(
                f"export: the pair must fit on the disk and be allowed there, got {error.strerror or error} "
                f"writing to {directory}; nothing was left there"
            ) from error
        raise
    temporary.rmdir()
