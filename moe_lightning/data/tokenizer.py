"""Text to token ids and back: the interface."""

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
