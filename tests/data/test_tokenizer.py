import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.training.data.bpe_tokenizer import BpeTokenizer, train_bpe
from moe_lightning.training.data.byte_tokenizer import ByteTokenizer
from moe_lightning.training.data.corpus import scan
from moe_lightning.training.data.saved_tokenizer import load_tokenizer
from moe_lightning.training.data.split import Piece


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> BpeTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "text.txt"
    path.write_text("def add(first, second):\n    return first + second\n" * 50)
    return train_bpe([Piece(document) for document in scan(str(path))], 280)


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(text=TEXT)
def test_bpe_round_trips_text_it_never_saw(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eos_id not in ids
    assert all(0 <= token < bpe.vocab_size for token in ids)


def test_bytes_leave_out_end_of_text_and_mark_broken_utf8():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode([0xC3, 104]) == "\ufffdh"


def test_bpe_merges_what_is_frequent(bpe):
    text = "    return first + second\n"
    assert len(bpe.encode(text)) < len(text) / 2


def test_bpe_takes_the_name_of_a_special_token_for_text(bpe):
    text = "a <|endoftext|> b"
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.eos_id not in bpe.encode(text)
    assert bpe.decode([*bpe.encode("a"), bpe.eos_id]) == "a"


def test_bpe_of_little_text_keeps_the_size_that_was_asked_for(text_file):
    tokenizer = train_bpe([Piece(document) for document in scan(str(text_file))], 32000)
    assert tokenizer.vocab_size == 32000
    assert tokenizer.decode([31999]) == ""


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_json_round_trip(bpe, kind):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    again = load_tokenizer(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    text = "return <|endoftext|> élan"
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "words"}', '{"kind": "bpe", "model": "{}", "vocab_size": 300}'])
def test_damaged_json_is_one_clear_line(text):
    with pytest.raises(ValueError, match=r"^data\.tokenizer: must be JSON written by to_json, got"):
        load_tokenizer(text)


def test_bpe_training_is_deterministic(folder):
    pieces = [Piece(document) for document in scan(str(folder))]
    assert train_bpe(pieces, 400).to_json() == train_bpe(pieces, 400).to_json()
