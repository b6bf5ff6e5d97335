"""The files that a path, a folder or a glob names, and which of them hold plain text.

A file is found once, whatever its links, and a loop of links is not followed.
"""

import glob
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# A folder may hold anything; only these suffixes are read from it. A file or a glob is taken at its word.
_TEXT = "txt md rst tex html xml csv json yaml toml py c h cc cpp hpp cu cuh rs go java js ts sh sql"
TEXT_SUFFIXES = frozenset(f".{ending}" for ending in _TEXT.split())

_RECORDS = "write the text of the records to .txt files"
_PACKED = "unpack it"
_TOKENS = "give the text it was made from"
#: Formats of data sets that are not read -> what to do instead.
REMEDIES = {
    "JSON Lines": _RECORDS,
    "JSON records": _RECORDS,
    "Parquet": _RECORDS,
    "Arrow": _RECORDS,
    "TFRecord": _RECORDS,
    "gzip": _PACKED,
    "Zstandard": _PACKED,
    "xz": _PACKED,
    "bzip2": _PACKED,
    "LZ4": _PACKED,
    "zip": _PACKED,
    "tar": _PACKED,
    "NumPy": _TOKENS,
    "binary tokens": _TOKENS,
    "token index": _TOKENS,
}
_ENDINGS = {
    "JSON Lines": "jsonl ndjson",
    "Parquet": "parquet",
    "Arrow": "arrow feather",
    "TFRecord": "tfrecord",
    "gzip": "gz tgz",
    "Zstandard": "zst",
    "xz": "xz",
    "bzip2": "bz2",
    "LZ4": "lz4",
    "zip": "zip",
    "tar": "tar",
    "NumPy": "npy npz",
    "binary tokens": "bin",
    "token index": "idx",
}
#: suffix -> name of the format
UNREAD_SUFFIXES = {f".{ending}": name for name, endings in _ENDINGS.items() for ending in endings.split()}
_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "LZ4",
    b"PK\x03\x04": "zip",
    b"\x93NUMPY": "NumPy",
    b"MMIDIDX\x00\x00": "token index",  # of Megatron-LM
}
_TAR_MAGIC = slice(257, 262)


def unread_format(head: bytes, suffix: str) -> str | None:
    """The format of REMEDIES that a file's first bytes show, or None if they may be text.

    A JSON file is text, as source code has many, unless it is an array of records or holds one on each line.
    """
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[_TAR_MAGIC] == b"ustar":
        return "tar"
    return "JSON records" if suffix == ".json" and _holds_records(head) else None


def _holds_records(head: bytes) -> bool:
    if re.match(rb"\s*\[\s*\{", head):
        return True
    lines = [line for line in head.split(b"\n", 3)[:3] if line.strip()]
    return len(lines) > 1 and all(_is_record(line) for line in lines[:2])


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


_CACHES = frozenset({"__pycache__"})
# Installed packages and test data differ from machine to machine; the library itself does not.
_STDLIB_SKIPPED = _CACHES | {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Skipped = list[tuple[Path, str]]  # (path, why)


def find_files(path: str | None) -> tuple[list[tuple[Path, os.stat_result]], Skipped]:
    """The regular files named by ``path`` with their status, sorted by path, and what could not be looked at.

    ``path`` is a file, a folder (recursive: files with a suffix of text or of a data format, nothing hidden, no
    linked folder), a glob (``**`` is recursive, through linked folders too), or None: the source of the running
    Python's standard library. A file with several names is there once, under the first of them.
    ValueError where ``path`` is no glob and nothing is there.
    """
    files, skipped, seen = [], Skipped(), set()
    for file in sorted(set(_named(path, skipped)), key=Path.as_posix):
        try:
            status = file.stat()
        except OSError as error:
            skipped.append((file, unreadable(error)))
            continue
        if stat.S_ISREG(status.st_mode) and _identity(status) not in seen:
            seen.add(_identity(status))
            files.append((file, status))
    return files, skipped


def unreadable(error: OSError) -> str:
    """Why a file is skipped that cannot be read."""
    return f"unreadable ({error.strerror or error})"


def _named(path: str | None, skipped: Skipped) -> Iterator[Path]:
    if path is None:
        stdlib = sysconfig.get_path("stdlib")
        return (file for file in _below(stdlib, _STDLIB_SKIPPED, skipped) if file.suffix == ".py")
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        return (file for file in _below(root, _CACHES, skipped) if _may_hold_data(file.suffix.lower()))
    try:
        os.stat(root)
    except OSError as error:
        if glob.has_magic(path):
            return map(Path, _matches(root, skipped))
        raise ValueError(
            f"data.corpus: path must be a file, a folder or a glob, got {path!r}: {error.strerror}"
        ) from None
    return iter([Path(root)])


def _may_hold_data(suffix: str) -> bool:
    return suffix in TEXT_SUFFIXES or suffix in UNREAD_SUFFIXES


def _below(root: str, left_out: frozenset[str], skipped: Skipped) -> Iterator[Path]:
    for folder, names, links in _walk(root, skipped, left_out):
        skipped.extend((Path(link), "linked folders") for link in links)
        yield from (Path(folder, name) for name in names)


def _matches(pattern: str, skipped: Skipped) -> Iterator[str]:
    """``glob.iglob``, which would follow a loop of links forty deep, and two of them 2^40 times."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    deep = parts.index("**")
    before = os.sep.join(parts[:deep]) if parts[0] else os.sep.join([*parts[:deep], ""])
    after = parts[deep + 1 :]
    while after[:1] == ["**"]:
        after = after[1:]
    for root in glob.iglob(before) if before else [os.curdir]:
        for folder, names, _ in _walk(root, skipped, follow_links=True):
            if after:
                yield from _matches(os.path.join(glob.escape(folder), *after), skipped)
            else:
                yield from (os.path.join(folder, name) for name in names)


def _walk(
    root: str, skipped: Skipped, left_out: frozenset[str] = frozenset(), follow_links: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, its files' names, its linked folders) of ``root`` and all below: each folder once, links last."""
    entered: set[tuple[int, int]] = set()
    folders, later = [root], list[str]()
    while folders or later:
        folder = folders.pop() if folders else later.pop(0)
        try:
            identity = _identity(os.stat(folder))
            if identity in entered:
                continue
            entered.add(identity)
            entries = list(os.scandir(folder))
        except NotADirectoryError:
            continue
        except OSError as error:
            skipped.append((Path(folder), unreadable(error)))
            continue
        names, links = [], []
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in left_out:
                continue
            if not os.path.isdir(entry.path):
                names.append(entry.name)
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                folders.append(entry.path)
        if follow_links:
            later.extend(links)
        yield folder, names, links


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
