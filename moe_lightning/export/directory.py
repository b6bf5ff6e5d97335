"""The folder of an exported pair: what it must be, and how the pair gets there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_lightning.utils.checkpoint_file import HOST, alive, sync

#: The graph, and the weights it names; Netron and onnxruntime find the second beside the first.
MODEL_FILE = "__model__"
PARAMS_FILE = "__params__"
_PREFIX = f".export-{HOST}-"


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
                f"export: the directory must not lie behind a symbolic link, got {directory} ({part} is one); "
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
def written_whole(directory: Path) -> Iterator[Path]:
    """An empty folder to write the pair into; on leaving it without an error the pair moves to `directory`.

    At no moment does a graph stand beside weights that are not its own. What cannot be written is a ValueError.
    """
    directory = check_directory(directory)
    there = directory.is_dir()
    home = directory if there else directory.parent  # one file system, so renames are atomic
    made = [part for part in (home, *home.parents) if not part.exists()]
    temporary = temporary_in(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove_leftovers(home)
        temporary.mkdir()
        yield temporary
        for name in (MODEL_FILE, PARAMS_FILE):
            sync(temporary / name)
        if there:
            (directory / MODEL_FILE).unlink(missing_ok=True)
            os.replace(temporary / PARAMS_FILE, directory / PARAMS_FILE)
            os.replace(temporary / MODEL_FILE, directory / MODEL_FILE)
            temporary.rmdir()
        else:
            os.replace(temporary, directory)
        sync(home)
    except BaseException as error:
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


def temporary_in(home: Path) -> Path:
    """A name for what this process is about to write there."""
    return home / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"


def remove_leftovers(home: Path) -> None:
    """What processes of this host were writing there when they were killed."""
    for leftover in home.glob(f"{_PREFIX}*"):
        pid = leftover.name.removeprefix(_PREFIX).partition("-")[0]
        if not pid.isdigit() or alive(int(pid)):
            continue
        if leftover.is_symlink():
            leftover.unlink(missing_ok=True)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
