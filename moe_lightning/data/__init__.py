"""Text in, batches of token ids out: corpus -> split -> tokenizer -> token file -> windows -> loader."""

from moe_lightning.data.byte_tokenizer import ByteTokenizer
from moe_lightning.data.datamodule import TextDataModule
from moe_lightning.data.saved_tokenizer import load_tokenizer
from moe_lightning.data.tokenizer import Tokenizer

__all__ = ["ByteTokenizer", "TextDataModule", "Tokenizer", "load_tokenizer"]
