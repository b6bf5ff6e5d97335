"""A tokenizer back from the string that a checkpoint keeps."""

import json

from moe_lightning.data.bpe_tokenizer import BpeTokenizer
from moe_lightning.data.byte_tokenizer import ByteTokenizer
from moe_lightning.data.tokenizer import Tokenizer


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
