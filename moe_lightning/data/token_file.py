"""A tokenised corpus as one memory-mapped file.

Layout: one line of JSON padded with spaces to HEADER_BYTES, then the ids of train, validation and test one
after the other, little-endian. Every document ends with the tokenizer's end-of-text id.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_lightning.data.progress import slow_progress
from moe_lightning.data.split import Piece
from moe_lightning.data.tokenizer import Tokenizer

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
