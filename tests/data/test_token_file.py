import numpy as np
import pytest

from moe_lightning.data.corpus import scan, split
from moe_lightning.data.prepare import HEADER_BYTES, is_whole, read_tokens, write_tokens
from moe_lightning.data.tokenizer import ByteTokenizer


class WideTokenizer(ByteTokenizer):
    """Bytes with ids that need 32 bits."""

    vocab_size = 1 << 17

    def encode(self, text: str) -> np.ndarray:
        return super().encode(text).astype(np.uint32) + (1 << 16)


def write(path, corpus, tokenizer=None):
    with path.open("wb") as file:
        write_tokens(file, split(scan(str(corpus))), tokenizer or ByteTokenizer())
    return path


def test_tokens_are_the_documents_each_with_an_end(tmp_path, folder):
    path = write(tmp_path / "tokens", folder)
    assert is_whole(path)
    for name, pieces in split(scan(str(folder))).items():
        expected = [token for piece in pieces for token in (*"".join(piece.parts()).encode(), 256)]
        assert read_tokens(path)[name].tolist() == expected


def test_tokens_are_mapped_and_read_only(tmp_path, text_file):
    tokens = read_tokens(write(tmp_path / "tokens", text_file))["train"]
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable


def test_large_vocabulary_takes_32_bits(tmp_path, text_file):
    path = write(tmp_path / "tokens", text_file, WideTokenizer())
    tokens = read_tokens(path)["train"]
    assert is_whole(path)
    assert tokens.dtype == np.uint32
    assert tokens[0] == ord(text_file.read_text()[0]) + (1 << 16)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 100] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def wipe_header(path):
    path.write_bytes(b"[1]" + path.read_bytes()[3:])


@pytest.mark.parametrize("damage", [cut, grow, flip_one_bit, empty, wipe_header])
def test_damage_is_seen(tmp_path, text_file, damage):
    path = write(tmp_path / "tokens", text_file)
    damage(path)
    assert not is_whole(path)
    assert not is_whole(tmp_path / "missing")
