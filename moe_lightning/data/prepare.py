"""From a path to tokens on disk, kept in the cache under the hash of what they were made from."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_lightning.data import corpus
from moe_lightning.data.bpe_tokenizer import train_bpe
from moe_lightning.data.byte_tokenizer import ByteTokenizer
from moe_lightning.data.cache import build_once, private_folder
from moe_lightning.data.file_records import FileRecords
from moe_lightning.data.saved_tokenizer import load_tokenizer
from moe_lightning.data.split import RULE_VERSION, Piece, split
from moe_lightning.data.token_file import is_whole, read_tokens, write_tokens
from moe_lightning.data.tokenizer import Tokenizer

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
