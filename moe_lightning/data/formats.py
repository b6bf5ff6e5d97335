"""Which files hold plain text, and which hold text or tokens in a format that is not read."""

import json
import re

# A folder may hold anything; only these suffixes are read from it. A file or a glob is taken at its word.
_TEXT = "txt md rst tex html xml csv json yaml toml py c h cc cpp hpp cu cuh rs go java js ts sh sql"
TEXT_SUFFIXES = frozenset(f".{ending}" for ending in _TEXT.split())

_RECORDS = "write the text of the records to .txt files"
_PACKED = "unpack it"
_TOKENS = "give the text behind it"
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
