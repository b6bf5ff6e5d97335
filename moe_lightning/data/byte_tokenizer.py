"""The tokenizer that needs no training: a byte is a token."""

import json
from collections.abc import Iterable

import numpy as np

from moe_lightning.data.tokenizer import Tokenizer


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
