import json
import random
import signal
import subprocess

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from random_text import words

from moe_lightning.data import bpe_training
from moe_lightning.data import tokenizer as tokenizer_module
from moe_lightning.data.bpe_training import learn
from moe_lightning.data.corpus import Piece, scan
from moe_lightning.data.tokenizer import BpeTokenizer, ByteTokenizer, load_tokenizer, train_bpe


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


def test_bpe_is_learned_from_a_sample_that_the_text_decides(folder, monkeypatch):
    """The sample has its size, is spread over all of the text, and goes by the content alone."""
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BYTES", 6000)
    pieces = [Piece(document) for document in scan(str(folder))]
    sample = tokenizer_module._sample(pieces)
    assert [len(text) for text in sample] == [200] * 30  # of 120 texts of 200 bytes
    texts = ["".join(piece.parts()) for piece in pieces]
    assert [texts.index(text) for text in sample] == list(range(3, 120, 4))
    model = train_bpe(pieces, 400).to_json()
    moved = folder.rename(folder.with_name("moved"))
    assert train_bpe([Piece(document) for document in scan(str(moved))], 400).to_json() == model
    assert json.loads(json.loads(model)["model"])["model"]["vocab"] == json.loads(learn(sample, 400))["model"]["vocab"]


def test_bpe_of_text_that_never_repeats_stops_at_a_bound_of_different_words(monkeypatch):
    monkeypatch.setattr(bpe_training, "DISTINCT_BYTES", 1000)
    random_texts = [words(25, f"{i}-") for i in range(50)]  # 175 bytes of words and 25 spaces each
    assert len(list(bpe_training._until_distinct(random_texts))) == 6
    assert sorted(bpe_training._until_distinct(["a b!? "] * 500)) == ["a b!? "] * 500
    assert (
        len(list(bpe_training._until_distinct([chr(33 + i % 15) * 100 + chr(33 + i // 15) for i in range(50)]))) == 10
    )


SHAPES = {
    "letters": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=20_000)),
    "one letter": "a" * 20_000,
    "spaces": " " * 20_000,
    "lines": "\n" * 20_000,
    "signs": "=-" * 10_000,
    "wide": "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9000), k=7_000))),
}


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_bpe_cuts_what_has_no_boundary_so_that_work_grows_with_the_text(text):
    """Merging goes through a whole word each time: the longest has 64 bytes, and encoding loses nothing by it."""
    model = json.loads(learn([text], 400))
    tokenizer = BpeTokenizer(json.dumps(model), 400)
    splitter = tokenizers.Tokenizer.from_str(json.dumps(model)).pre_tokenizer
    assert max(len(word) for word, _ in splitter.pre_tokenize_str(text)) == 64
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) >= len(text.encode()) / 64


def test_bpe_learned_before_words_were_cut_is_still_read(bpe):
    """A checkpoint of before: the same ids, without a cut."""
    saved = json.loads(bpe.to_json())
    model = json.loads(saved["model"])
    model["pre_tokenizer"] = model["pre_tokenizer"]["pretokenizers"][0]
    assert model["pre_tokenizer"]["type"] == "ByteLevel"
    before = load_tokenizer(json.dumps({**saved, "model": json.dumps(model)}))
    text = "def add(first):\n    return first\n"
    assert before.encode(text).tolist() == bpe.encode(text).tolist()
    assert before.decode(before.encode("a" * 1000)) == "a" * 1000


def test_interrupt_while_a_bpe_is_learned_ends_its_process_at_once(folder, monkeypatch):
    """It arrives in the middle of the library's call, which knows no interruption."""
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *args, **kwargs):
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_bpe([Piece(document) for document in scan(str(folder))], 400)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_process_that_learns_a_bpe_and_is_killed_is_one_line(folder, monkeypatch):
    class Killed(subprocess.Popen):
        def communicate(self, *args, **kwargs):
            self.kill()
            return super().communicate(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Killed)
    with pytest.raises(
        ValueError, match=r"^data\.bpe: learning must not be stopped, got status -9 of its process; try"
    ):
        train_bpe([Piece(document) for document in scan(str(folder))], 400)
