"""Files that several processes may want at once and exactly one makes."""

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import Progress

from moe_lightning.utils.files import atomic_path


def private_folder(path: str | Path) -> Path:
    """Make the folder if it is missing and return it; ValueError if others could plant files in it."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache: cache_dir must be a folder this user can make, got {path}: {error}") from None
    if folder.stat().st_mode & stat.S_IWOTH:
        raise ValueError(f"data.cache: cache_dir must not be writable by everyone, got {path}; choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"data.cache: cache_dir must be writable by this user, got {path}; choose another")
    return folder


def build_once(path: Path, is_valid: Callable[[Path], bool], build: Callable[[BinaryIO], object]) -> Path:
    """Return ``path``, written by ``build`` unless it is already there and valid.

    Of several processes one builds and the others wait for it. The file appears whole or not at all. The
    kernel frees the lock of a killed writer.
    ValueError with the file's name where it cannot be written: a full disk, a folder in its place.
    """
    if is_valid(path):
        return path
    try:
        with _locked(path.with_name(path.name + ".lock")):
            if is_valid(path):  # another process made it while this one waited
                return path
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                build(file)
    except OSError as error:
        raise ValueError(
            f"data.cache: {path} must be a file that can be written, got {error.strerror or error}; "
            "make room for it or choose another cache_dir"
        ) from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file stays: removing it would let two processes hold "the" lock on two different files.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rank_zero_info(f"data.cache: waiting for the process that is writing {path.with_suffix('')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def slow_progress(title: str, total: int | None, after_s: float = 3.0) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(amount)``; a bar on stderr appears once the work has taken ``after_s`` seconds.

    Without a ``total`` the bar shows that the work goes on: call ``advance(0)`` from time to time.
    """
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    start = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if not bar.live.is_started and time.monotonic() - start > after_s:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
