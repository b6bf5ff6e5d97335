"""Text in, batches of token ids out: corpus -> split -> tokenizer -> token file -> windows -> loader."""

from moe_lightning.training.data.datamodule import TextDataModule
from moe_lightning.training.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "TextDataModule", "Tokenizer", "load_tokenizer"]
