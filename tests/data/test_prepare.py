import json
import multiprocessing
import os

import numpy as np
import pytest
from data_processes import prepare_and_measure, prepare_and_report

from moe_lightning.data import corpus, prepare
from moe_lightning.data.prepare import prepare_text
from moe_lightning.data.tokenizer import ByteTokenizer


@pytest.fixture
def work(monkeypatch):
    """The names of the costly steps, as they happen."""
    done = []
    for name in ("train_bpe", "write_tokens"):
        step = getattr(prepare, name)
        monkeypatch.setattr(prepare, name, lambda *args, name=name, step=step: (done.append(name), step(*args))[1])
    return done


def test_second_call_does_no_work(folder, tmp_path, work):
    cache = str(tmp_path / "cache")
    first = prepare_text(str(folder), "bpe", 300, cache)
    assert work == ["train_bpe", "write_tokens"]
    second = prepare_text(str(folder), "bpe", 300, cache)
    assert work == ["train_bpe", "write_tokens"]
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.to_json() == second.tokenizer.to_json()
    np.testing.assert_array_equal(first.tokens["train"], second.tokens["train"])


def test_cache_goes_by_content_and_not_by_time_or_place(folder, tmp_path, work):
    cache = str(tmp_path / "cache")
    prepare_text(str(folder), "bpe", 300, cache)
    work.clear()
    os.utime(folder / "000.txt", (0, 0))
    moved = folder.rename(folder.with_name("moved"))
    prepare_text(str(moved), "bpe", 300, cache)
    assert work == []
    (moved / "000.txt").write_text("something else")
    prepare_text(str(moved), "bpe", 300, cache)
    assert work == ["train_bpe", "write_tokens"]


def test_other_vocabulary_and_other_tokenizer_are_other_files(folder, tmp_path, work):
    cache = str(tmp_path / "cache")
    texts = [
        prepare_text(str(folder), "bytes", 257, cache),
        prepare_text(str(folder), "bpe", 300, cache),
        prepare_text(str(folder), "bpe", 310, cache),
    ]
    assert work == ["write_tokens", "train_bpe", "write_tokens", "train_bpe", "write_tokens"]
    assert len({text.fingerprint for text in texts}) == 3


def test_given_tokenizer_is_used_and_none_is_trained(folder, tmp_path, work):
    text = prepare_text(str(folder), "bpe", 300, str(tmp_path / "cache"), ByteTokenizer())
    assert work == ["write_tokens"]
    assert text.tokenizer.vocab_size == 257


@pytest.mark.parametrize("pattern", ["tokens-*.bin", "bpe-*.json"])
def test_truncated_cache_file_is_made_again(folder, tmp_path, pattern):
    cache = tmp_path / "cache"
    prepare_text(str(folder), "bpe", 300, str(cache))
    (path,) = cache.glob(pattern)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    prepare_text(str(folder), "bpe", 300, str(cache))
    assert path.read_bytes() == whole


@pytest.fixture
def read(monkeypatch):
    """The names of files whose content is read, as it happens; no file is too young to be remembered."""
    monkeypatch.setattr(corpus, "SETTLED_NS", -(1 << 62))
    names = []
    examine, check = corpus._examine, prepare.is_whole
    monkeypatch.setattr(corpus, "_examine", lambda file, *args: (names.append(file.name), examine(file, *args))[1])
    monkeypatch.setattr(prepare, "is_whole", lambda file: (names.append("tokens"), check(file))[1])
    return names


def test_start_after_the_first_reads_no_content_again(folder, tmp_path, read):
    cache = str(tmp_path / "cache")
    (folder / "bad.txt").write_bytes(b"\xff")
    for _ in range(2):  # a token file is checked once after it was built
        prepare_text(str(folder), "bytes", 257, cache)
    assert sorted(set(read)) == [*(f"{i:03}.txt" for i in range(120)), "bad.txt", "tokens"]
    read.clear()
    with pytest.warns(UserWarning, match="skipped 1 not UTF-8; the first is"):
        first = prepare_text(str(folder), "bytes", 257, cache)
    assert read == []
    (folder / "007.txt").write_text("now longer" * 30)
    second = prepare_text(str(folder), "bytes", 257, cache)
    assert read == ["007.txt"]
    assert first.fingerprint != second.fingerprint


def test_token_file_that_changed_is_checked_again(folder, tmp_path, read):
    cache = tmp_path / "cache"
    for _ in range(2):
        prepare_text(str(folder), "bytes", 257, str(cache))
    (path,) = cache.glob("tokens-*.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")  # one bit, the same size
    read.clear()
    prepare_text(str(folder), "bytes", 257, str(cache))
    assert set(read) == {"tokens"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": "another", "files": []}', None])
def test_damaged_record_of_files_is_made_again(folder, tmp_path, read, content):
    cache = tmp_path / "cache"
    first = prepare_text(str(folder), "bytes", 257, str(cache))
    (path,) = cache.glob("files-*.json")
    path.unlink()
    path.write_bytes(content) if content is not None else path.mkdir()
    if content is None:  # nothing can be remembered, and all goes on
        with pytest.warns(
            UserWarning, match=r"^data\.cache: \S+\.json must be a file .* the next start reads the text"
        ):
            second = prepare_text(str(folder), "bytes", 257, str(cache))
    else:
        second = prepare_text(str(folder), "bytes", 257, str(cache))
        assert len(json.loads(path.read_bytes())["files"]) == 121
    assert first.fingerprint == second.fingerprint


def test_file_that_may_have_changed_within_a_tick_of_the_clock_is_read_again(text_file, tmp_path, monkeypatch):
    """Two contents of one size and one time are told apart, for a young file is not remembered."""
    cache = str(tmp_path / "cache")
    for module in (corpus,):
        monkeypatch.setattr(module, "file_stamp", lambda status: (0, 0, 0))
    first = prepare_text(str(text_file), "bytes", 257, cache)
    text_file.write_text(text_file.read_text()[::-1])
    assert prepare_text(str(text_file), "bytes", 257, cache).fingerprint != first.fingerprint


def test_calls_that_tokenise_are_short_enough_to_be_interrupted(tmp_path, monkeypatch):
    """Each has a megabyte of the text at most, whatever the file's size, so that memory has a bound too."""
    (tmp_path / "a.txt").write_text("0123456789abcde\n" * (1 << 18))  # 4 MB
    sizes = []

    def encode_many(self, texts):
        sizes.append(sum(map(len, texts)))
        return [np.zeros(len(text), np.uint16) for text in texts]

    monkeypatch.setattr(ByteTokenizer, "encode_many", encode_many)
    tokens = prepare_text(str(tmp_path / "a.txt"), "bytes", 257, str(tmp_path / "cache")).tokens
    assert sum(sizes) == 1 << 22
    assert max(sizes) == 1 << 20
    assert [len(ids) for ids in tokens.values()] == [3774874, 209716, 209717]  # with one end each


@pytest.mark.slow
def test_preparing_one_large_file_takes_little_memory(tmp_path):
    """32 MB, in one line or in many: before, and where the cache has it, less than half of it stays in memory."""
    (tmp_path / "a.txt").write_bytes(b"0123456789abcdef" * (1 << 21))
    context = multiprocessing.get_context("forkserver")
    for _ in range(2):
        ours, theirs = context.Pipe()
        arguments = (theirs, str(tmp_path / "a.txt"), str(tmp_path / "cache"))
        process = context.Process(target=prepare_and_measure, args=arguments, daemon=True)
        process.start()
        theirs.close()
        grown = ours.recv()
        process.join()
        assert grown < 16 << 20


@pytest.mark.slow
def test_two_processes_at_once_do_the_work_once(folder, tmp_path):
    context = multiprocessing.get_context("forkserver")
    cache = str(tmp_path / "cache")
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=prepare_and_report, args=(theirs, str(folder), cache), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    (work, *first), (other_work, *second) = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    assert first == second
    assert sorted(work + other_work) == ["train_bpe", "write_tokens"]
