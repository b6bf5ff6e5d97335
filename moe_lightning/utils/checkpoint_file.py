"""Checkpoints that are written whole or not at all, and in which a single flipped bit is noticed.

A checkpoint is torch's own zip file with the SHA-256 of all bytes before it in the zip's comment, so plain
`torch.load(path, weights_only=True)` reads it too. torch itself loads a flipped bit without an error.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_lightning.utils.files import atomic_path, os_error_of

_MARK = b"moe_lightning sha256 "
#: Bytes of the record that ends a zip without a comment.
_ZIP_END = 22
_COMMENT_SIZE = len(_MARK) + hashlib.sha256().digest_size


class NotWrittenError(OSError):
    """A checkpoint that the disk did not take; what was at its path before is still there."""


class NotPlainError(ValueError):
    """A checkpoint that could be written but not be read back as tensors and plain types."""


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write `checkpoint` to `path` atomically, digest included.

    Raises:
        NotWrittenError: the disk is full or does not allow it. torch itself hides that in a RuntimeError.
        NotPlainError: `load_checkpoint` would refuse it.
    """
    path = Path(path)
    try:
        with atomic_path(path) as temporary:
            with temporary.open("x+b") as file:
                torch.save(checkpoint, file)
                _append_digest(file)
            # Tensors stay on the disk: only what is around them is read.
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
    except BaseException as error:
        if (cause := os_error_of(error)) is not None:
            raise NotWrittenError(
                f"checkpoint: {path} must fit on the disk and be allowed there, got {cause.strerror or cause}; "
                "what it held before is still there"
            ) from error
        if isinstance(error, Exception):
            check_plain(checkpoint)
        raise


def check_plain(checkpoint: dict[str, Any]) -> None:
    """Raise NotPlainError, with the place and the type, if `load_checkpoint` would refuse what is to be saved."""
    for place, value in _not_plain(checkpoint, ()):
        names = ".".join(map(str, place))
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise NotPlainError(
            f"checkpoint: it must hold tensors and plain types alone, got {kind} at {names}; {_whose(place)}"
        )


def _whose(place: tuple[Any, ...]) -> str:
    """Who put a value there, and what they can do."""
    if place[0] == "callbacks" and len(place) > 1:
        return f"let state_dict of the callback {place[1]} return a number, a text or a tensor"
    if place[0] in ("hyper_parameters", "datamodule_hyper_parameters"):
        return "leave it out of save_hyperparameters, or pass a number or a text"
    return "it was put there by a state_dict or on_save_checkpoint; store a number, a text or a tensor"


def _not_plain(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Places of what cannot be read back, innermost first."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return
    found = False
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            for inner in (*_not_plain(key, (*place, key)), *_not_plain(part, (*place, key))):
                found = True
                yield inner
    if not found and type(value) not in (dict, OrderedDict, list, tuple) and not _can_be_read(value):
        yield place, value


def _can_be_read(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def load_checkpoint(
    path: str | Path, map_location: Any = "cpu", require_digest: bool = True, mmap: bool = False
) -> dict[str, Any]:
    """Verify and read a checkpoint, tensors and plain types only.

    Args:
        path: a local file.
        map_location: as in `torch.load`.
        require_digest: refuse a file that `torch.save` wrote without one, as a Trainer without `VerifiedCheckpointIO`
            does.
        mmap: tensors stay on the disk, verified, until they are used.

    Raises:
        ValueError: it is a URL, missing, damaged, or holds objects that only a full unpickling would make.
    """
    if "://" in str(path):
        raise ValueError(f"checkpoint: it must be a local file, got {path}; download it and check its source")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: the file must exist, got {path}")
    if require_digest or not _is_plain_zip(path):
        verify_checkpoint(path)
    _check_stored(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
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
        if _is_plain_zip(path):
            raise ValueError(
                f"checkpoint: it must be written by moe_lightning, got {path} of torch.save or plain Lightning "
                "without a SHA-256 at its end; train one with train.py, or read it with torch.load if you trust it"
            )
        raise _damaged(path, "its end, with the digest, is missing")
    if comment[len(_MARK) :] != digest:
        raise _damaged(path, "its SHA-256 differs from the one written with it")


def _check_stored(path: Path) -> None:
    """torch stores entries as they are; one that would grow on reading could take all memory."""
    if not zipfile.is_zipfile(path):
        return  # torch raises the error
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    grown = sum(entry.file_size for entry in entries)
    if grown > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"checkpoint: its entries must be stored as they are, got {path}, whose entries grow to {grown:,} bytes; "
            "do not trust this file"
        )


def _is_plain_zip(path: Path) -> bool:
    """Whether the file ends in a zip's last record without a comment."""
    with path.open("rb") as file:
        file.seek(-min(_ZIP_END, path.stat().st_size), os.SEEK_END)
        record = file.read()
    return record.startswith(b"PK\x05\x06") and record.endswith(b"\0\0")


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
