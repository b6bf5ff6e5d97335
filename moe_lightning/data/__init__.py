"""Text in, batches of token ids out: corpus -> tokenizer -> token file -> windows -> loader."""

from moe_lightning.data.datamodule import TextDataModule
from moe_lightning.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "TextDataModule", "Tokenizer", "load_tokenizer"]
