"""Checkpoints that are written whole or not at all, and that notice a single flipped bit.

A checkpoint is torch's own zip file with the SHA-256 of all bytes before it in the zip's comment, so plain
`torch.load(path, weights_only=True)` reads it too. torch itself loads a flipped bit without a word.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

_MARK = b"moe_lightning sha256 "
#: In the names of files that a process of this host is writing.
HOST = re.sub(r"[^\w]", "_", socket.gethostname())
_COMMENT_SIZE = len(_MARK) + hashlib.sha256().digest_size


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Atomic save (temporary file, fsync, rename) with a digest; load verifies it and unpickles weights only."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` so that `path` is, at every moment, the old file or the whole new one."""
        save_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a verified file; `weights_only` cannot be switched off."""
        return load_checkpoint(path, map_location or "cpu")


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write `checkpoint` to `path` atomically, digest included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.parent / f".{uuid.uuid4().hex}.{HOST}-{os.getpid()}.tmp"
    try:
        with temporary.open("x+b") as file:
            torch.save(checkpoint, file)
            _append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Verify and read a checkpoint, tensors and plain types only.

    Raises:
        ValueError: it is a URL, missing, damaged, or holds objects that only a full unpickling would make.
    """
    if "://" in str(path):
        raise ValueError(f"checkpoint: it must be a local file, got {path}; download it and check its source")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: the file must exist, got {path}")
    verify_checkpoint(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"checkpoint: only tensors and plain types are loaded, got {path} ({reason}); do not trust this file"
        ) from error


def verify_checkpoint(path: Path) -> None:
    """Raise ValueError if `path` is not byte for byte what was saved."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _COMMENT_SIZE:
            raise _damaged(path, f"{size} bytes are too few")
        digest = _digest(file, size - _COMMENT_SIZE)
        comment = file.read()
    if not comment.startswith(_MARK):
        raise _damaged(path, "its end, where the digest stands, is missing")
    if comment[len(_MARK) :] != digest:
        raise _damaged(path, "its SHA-256 differs from the one written with it")


def _append_digest(file: Any) -> None:
    """Announce a comment in the zip's last field, then write the digest of everything before it as that comment."""
    end = file.seek(0, os.SEEK_END)
    file.seek(end - 2)
    if file.read(2) != b"\0\0":
        raise RuntimeError("checkpoint: torch.save must end in a zip record without comment, got another format")
    file.seek(end - 2)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    file.seek(0)
    digest = _digest(file, end)
    file.seek(end)
    file.write(_MARK + digest)


def _digest(file: Any, size: int) -> bytes:
    """SHA-256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(size, 1 << 22))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"checkpoint: {path} is damaged, {reason}; use an older checkpoint")


def sync(path: Path) -> None:
    """Have it on the disk, a file's bytes or a folder's names: what was renamed survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of processes of this host that were killed in a save."""
    for leftover in folder.glob(f".*.{HOST}-*.tmp"):
        pid = leftover.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdigit() and not alive(int(pid)):
            leftover.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
