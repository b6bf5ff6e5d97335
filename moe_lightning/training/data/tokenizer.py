"""Text to token ids and back: the interface, and the one that needs no training."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np


class Tokenizer(ABC):
    """Ids are in [0, vocab_size); ``eos_id`` ends a document and never comes out of ``encode``."""

    vocab_size: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``: 1-D, an unsigned integer type."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; end-of-text and ids no text maps to are left out, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """Everything needed to make this tokenizer again with ``load_tokenizer``."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text."""
        return [self.encode(text) for text in texts]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for end of text."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        """One id a byte."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """The bytes read as UTF-8."""
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """There is nothing to keep but the kind."""
        return json.dumps({"kind": "bytes"})


def load_tokenizer(text: str) -> Tokenizer:
    """The tokenizer that wrote ``text`` with ``to_json``; ValueError if it is not such a string."""
    from moe_lightning.training.data.bpe import BpeTokenizer  # bpe.py builds on this file

    try:
        saved = json.loads(text)
        if saved["kind"] == "bytes":
            return ByteTokenizer()
        if saved["kind"] == "bpe":
            return BpeTokenizer(saved["model"], saved["vocab_size"])
    except Exception:  # tokenizers raises bare Exception for a model it cannot read
        pass
    raise ValueError(f"data.tokenizer: must be JSON written by to_json, got {text[:60]!r}; the file is damaged")
