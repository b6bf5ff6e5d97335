"""From a path to tokens on disk, kept in the cache under the hash of what they were made from.

Layout of a token file, which is memory-mapped: one line of JSON padded with spaces to HEADER_BYTES, then the ids of
train, validation and test one after the other, little-endian. Every document ends with the tokenizer's end-of-text id.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_lightning.data import corpus
from moe_lightning.data.cache import build_once, private_folder, slow_progress
from moe_lightning.data.corpus import RULE_VERSION, FileRecords, Piece, split
from moe_lightning.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

FORMAT = "moe_lightning tokens 1"
HEADER_BYTES = 512
# Parts of a document that are encoded in one call, which lasts under a second and cannot be interrupted.
PARTS_AT_ONCE = 16


def write_tokens(file: BinaryIO, splits: Mapping[str, Sequence[Piece]], tokenizer: Tokenizer) -> None:
    """Tokenise every piece into ``file``, which must be empty and seekable."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts, crc = dict.fromkeys(splits, 0), 0
    file.write(b" " * HEADER_BYTES)
    characters = sum(piece.characters for pieces in splits.values() for piece in pieces)
    with slow_progress("Tokenising", characters) as advance:
        for name, pieces in splits.items():
            for ids in _encoded(pieces, tokenizer, advance):
                block = ids.astype(dtype).tobytes()
                crc = zlib.crc32(block, crc)
                counts[name] += len(ids)
                file.write(block)
    header = json.dumps({"format": FORMAT, "dtype": dtype.str, "counts": counts, "crc32": crc}).encode()
    file.seek(0)
    file.write(header.ljust(HEADER_BYTES - 1) + b"\n")


def _encoded(pieces: Sequence[Piece], tokenizer: Tokenizer, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of every piece, each with an end."""
    for piece in pieces:
        parts = piece.parts()
        while batch := list(islice(parts, PARTS_AT_ONCE)):
            yield from tokenizer.encode_many(batch)
            advance(sum(map(len, batch)))
        yield np.array([tokenizer.eos_id])


def read_tokens(path: Path) -> dict[str, np.ndarray]:
    """The ids of each split by name: 1-D, read-only, uint16 or uint32, mapped and not checked."""
    header = _header(path)
    tokens = np.memmap(path, header["dtype"], mode="r", offset=HEADER_BYTES, shape=(sum(header["counts"].values()),))
    ends = np.cumsum(list(header["counts"].values()))
    return dict(zip(header["counts"], np.split(tokens, ends[:-1]), strict=True))


def is_whole(path: Path) -> bool:
    """Whether the file is there with the size and the checksum that its header promises."""
    try:
        header = _header(path)
        size = sum(header["counts"].values()) * np.dtype(header["dtype"]).itemsize
        if header["format"] != FORMAT or path.stat().st_size != HEADER_BYTES + size:
            return False
        with path.open("rb") as file:
            file.seek(HEADER_BYTES)
            crc = 0
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
        return crc == header["crc32"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _header(path: Path) -> dict:
    with path.open("rb") as file:
        return json.loads(file.read(HEADER_BYTES))


# Part of the key of a learned BPE: raise it when the way it is learned changes.
BPE_VERSION = "2"


@dataclass(frozen=True)
class PreparedText:
    """Token ids by split (1-D, read-only), the tokenizer that made them, a hash of text and tokenizer."""

    tokenizer: Tokenizer
    tokens: dict[str, np.ndarray]
    fingerprint: str


def prepare_text(
    path: str | None, kind: str, vocab_size: int, cache_dir: str, tokenizer: Tokenizer | None = None
) -> PreparedText:
    """Tokenise the corpus at ``path``, or open what an earlier call or another process made.

    ``tokenizer`` overrides ``kind`` and ``vocab_size``. ValueError for a bad path, an empty corpus, or a
    cache folder that everyone can write to.
    """
    folder = private_folder(cache_dir)
    records = FileRecords(folder / f"files-{_hash([os.path.abspath(path) if path else ''])}.json")
    splits = split(corpus.scan(path, records))
    records.save()
    if tokenizer is None:
        tokenizer = ByteTokenizer() if kind == "bytes" else _trained_bpe(folder, splits["train"], vocab_size)
    texts = [f"{name} {piece.first} {piece.document.digest}" for name, pieces in splits.items() for piece in pieces]
    fingerprint = _hash([RULE_VERSION, tokenizer.to_json(), *texts])
    file = build_once(
        folder / f"tokens-{fingerprint}.bin",
        lambda path: _is_whole(path, records),
        lambda file: write_tokens(file, splits, tokenizer),
    )
    records.save()
    return PreparedText(tokenizer, read_tokens(file), fingerprint)


def _is_whole(path: Path, records: FileRecords) -> bool:
    """``is_whole``, which reads all of the file, unless it is known to be."""
    try:
        status = path.stat()
    except OSError:
        return False
    if records.look_up(path, status) is not None:
        return True
    whole = is_whole(path)
    if whole:
        records.note(path, status, [])
    return whole


def _trained_bpe(folder: Path, pieces: Sequence[Piece], vocab_size: int) -> Tokenizer:
    texts = [f"{piece.first} {piece.document.digest}" for piece in pieces]
    path = folder / f"bpe-{vocab_size}-{_hash([BPE_VERSION, *texts])}.json"
    build_once(path, _is_tokenizer, lambda file: file.write(train_bpe(pieces, vocab_size).to_json().encode()))
    return load_tokenizer(path.read_text("utf-8"))


def _is_tokenizer(path: Path) -> bool:
    try:
        load_tokenizer(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
