"""Files and folders that are there whole or not at all: written under another name, flushed to disk, and renamed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: In the names of what a process of this host is writing.
HOST = re.sub(r"[^\w]", "_", socket.gethostname())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Where to write a temporary file; on leaving without an error it takes the place of `path`.

    Missing folders are made. An error leaves what was at `path` before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    temporary = temporary_path(path.parent)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content`, a text as UTF-8, in place of what is at `path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_directory(directory: Path, entry: str) -> Iterator[Path]:
    """An empty folder to write files into; on leaving without an error they move to `directory`.

    Other files of `directory` stay. An error leaves nothing of what was written, nor folders that were made for it.

    Args:
        directory: made if it does not exist.
        entry: name of the file that refers to the others. An older one is removed before they are replaced and
            the new one comes last, so that none is ever there with files that are not its own.
    """
    exists = directory.is_dir()
    home = directory if exists else directory.parent  # one file system, so renames are atomic
    made = [part for part in (home, *home.parents) if not part.exists()]
    temporary = temporary_path(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove_stale(home)
        temporary.mkdir()
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == entry)
        for file in files:
            sync(file)
        if exists:
            (directory / entry).unlink(missing_ok=True)
            for file in files:
                os.replace(file, directory / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, directory)
        sync(home)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # files of another process came in between: they stay
            for folder in filter(Path.exists, made):
                folder.rmdir()
        raise


def atomic_symlink(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, in place of what is there."""
    temporary = temporary_path(link.parent)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    os.replace(temporary, link)


def remove_tree(folder: Path) -> None:
    """Remove a folder so that it is never seen with a part of its files."""
    temporary = temporary_path(folder.parent)
    os.replace(folder, temporary)
    shutil.rmtree(temporary)


def temporary_path(folder: Path) -> Path:
    """A name in `folder` for what this process is about to write."""
    return folder / f".{uuid.uuid4().hex}.{HOST}-{os.getpid()}.tmp"


def remove_stale(folder: Path) -> None:
    """Remove what processes of this host were writing to `folder` when they were killed."""
    for stale in folder.glob(f".*.{HOST}-*.tmp"):
        pid = stale.name.removesuffix(".tmp").rpartition("-")[2]
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's names to disk: what was renamed survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def os_error_of(error: BaseException | None) -> OSError | None:
    """The OSError that an error is, or that it arose from: libraries wrap a full disk in errors of their own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
