"""A byte-level BPE tokenizer trained on the corpus, by the `tokenizers` library."""

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_lightning.training.data.progress import slow_progress
from moe_lightning.training.data.split import Piece
from moe_lightning.training.data.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte and end-of-text: any text can be encoded


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

    def encode(self, text: str) -> np.ndarray:
        """Ids of the merged byte pairs."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text, on all cores."""
        return [np.array(encoding.ids, np.uint32) for encoding in self._model.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The bytes of the tokens read as UTF-8."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The whole vocabulary and its merges."""
        return json.dumps({"kind": "bpe", "vocab_size": self.vocab_size, "model": self._model.to_str()})


def train_bpe(pieces: Sequence[Piece], vocab_size: int) -> BpeTokenizer:
    """Learn ``vocab_size`` tokens from the text of ``pieces``; the same text gives the same tokenizer."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_texts(pieces, vocab_size), trainer)
    return BpeTokenizer(model.to_str(), vocab_size)


def _texts(pieces: Sequence[Piece], vocab_size: int) -> Iterator[str]:
    with slow_progress(f"Learning {vocab_size} tokens", sum(piece.size for piece in pieces)) as advance:
        for piece in pieces:
            yield piece.read()
            advance(piece.size)
