"""Checks of the arguments a user types: one line, before any file is read."""

from moe_lightning.data.bpe_tokenizer import SMALLEST_VOCAB
from moe_lightning.data.byte_tokenizer import ByteTokenizer
from moe_lightning.utils.checks import check_choice, check_int

BPE_VOCAB = 4096
LARGEST_VOCAB = 1 << 20
LARGEST_WORKERS = 64  # a typo must not fork a thousand processes


def check_text(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a string with something in it that a path can have."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"data: {name} must be a non-empty string, got {value!r} ({type(value).__name__})")


def check_prompts(value: object) -> list[str]:
    """Return the prompts as a list; ValueError unless a string or a non-empty list of strings, all of them Unicode."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"data: prompt must be a string or a non-empty list of strings, got {value!r}")
    for text in prompts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            # Bytes of the command line that are not UTF-8 come as half surrogates.
            raise ValueError(f"data: prompt must be UTF-8 text, got {text!r}; convert it")
    return prompts


def check_vocab(tokenizer: object, vocab_size: int | None) -> int:
    """Return the size of the vocabulary; ValueError for an unknown tokenizer or a size it cannot have."""
    check_choice("data", "tokenizer", tokenizer, ("bytes", "bpe"))
    if vocab_size is None:
        return ByteTokenizer.vocab_size if tokenizer == "bytes" else BPE_VOCAB
    check_int("data", "vocab_size", vocab_size, SMALLEST_VOCAB, LARGEST_VOCAB)
    if tokenizer == "bytes" and vocab_size != ByteTokenizer.vocab_size:
        raise ValueError(f"data: vocab_size must be 257 with tokenizer='bytes', got {vocab_size}; leave it out")
    return vocab_size
