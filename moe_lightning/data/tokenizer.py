"""Text to token ids and back: a byte per token, or a byte-level BPE that is trained on the corpus."""

import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from typing_extensions import override

from moe_lightning.data import bpe_training
from moe_lightning.data.bpe_training import END_OF_TEXT
from moe_lightning.data.cache import slow_progress
from moe_lightning.data.corpus import Piece


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

    @override
    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    @override
    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    @override
    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


SMALLEST_VOCAB = 257  # every byte and end-of-text: any text can be encoded
#: The BPE is learned from at most this much text, as SentencePiece's input_sentence_size bounds its own.
SAMPLE_BYTES = 32 << 20


class BpeTokenizer(Tokenizer):
    """Byte-level BPE.

    ``model`` is the JSON of a `tokenizers.Tokenizer`. ``vocab_size`` is the size asked for; the model may
    know fewer tokens where the corpus was small. ValueError where it lacks the end-of-text token.
    """

    def __init__(self, model: str, vocab_size: int) -> None:
        self._model = tokenizers.Tokenizer.from_str(model)
        self._model.encode_special_tokens = True  # "<|endoftext|>" in the text is text
        self.vocab_size = vocab_size
        eos_id = self._model.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise ValueError(f"data.bpe: the model must have the token {END_OF_TEXT}, got one without")
        self.eos_id = eos_id

    @override
    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    @override
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text, on all cores."""
        return [np.array(encoding.ids, np.uint32) for encoding in self._model.encode_batch_fast(texts)]

    @override
    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    @override
    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "vocab_size": self.vocab_size, "model": self._model.to_str()})


def train_bpe(pieces: Sequence[Piece], vocab_size: int) -> BpeTokenizer:
    """Learn ``vocab_size`` tokens from a sample of ``pieces``; the same text gives the same tokenizer.

    The sample is all of the text up to SAMPLE_BYTES, else parts of 64 K characters spread evenly over it, so that time
    and memory have a bound. ValueError where the process that learns was ended from outside.
    """
    job: bytes | None = json.dumps({"texts": _sample(pieces), "vocab_size": vocab_size}, ensure_ascii=False).encode()
    command = [sys.executable, "-P", bpe_training.__file__]
    pipe = subprocess.PIPE
    with (
        slow_progress(f"Learning {vocab_size} tokens", None) as advance,
        # A group of its own: Ctrl-C is for this process alone, which then ends that one.
        subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0) as process,
    ):
        try:
            while process.returncode is None:
                try:
                    model, _ = process.communicate(job, timeout=0.5)
                except subprocess.TimeoutExpired:
                    job = None  # what is left of it is still sent
                    advance(0)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ValueError(
            f"data.bpe: learning must not be stopped, got status {process.returncode} of its process; "
            "try again, with more free memory or a smaller vocab_size"
        )
    return BpeTokenizer(model.decode(), vocab_size)


def _sample(pieces: Sequence[Piece]) -> list[str]:
    """Parts of the text, at most SAMPLE_BYTES, spread evenly over it."""
    total = sum(piece.size for piece in pieces)
    sample, passed, taken = [], 0, 0
    with slow_progress("Reading", total) as advance:
        for piece in pieces:
            for part in piece.parts():
                size = len(part.encode())
                passed += size
                if total <= SAMPLE_BYTES or taken + size <= passed * SAMPLE_BYTES / total:
                    sample.append(part)
                    taken += size
                advance(size)
    return sample


def load_tokenizer(text: str) -> Tokenizer:
    """The tokenizer that wrote ``text`` with ``to_json``; ValueError if it is not such a string."""
    try:
        saved = json.loads(text)
        if saved["kind"] == "bytes":
            return ByteTokenizer()
        if saved["kind"] == "bpe":
            return BpeTokenizer(saved["model"], saved["vocab_size"])
    except Exception:  # tokenizers raises bare Exception for a model it cannot read
        pass
    raise ValueError(f"data.tokenizer: must be JSON written by to_json, got {text[:60]!r}; the file is damaged")
