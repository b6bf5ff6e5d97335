import multiprocessing
import os

import numpy as np
import pytest
from data_processes import prepare_and_report

from moe_lightning.training.data import prepare
from moe_lightning.training.data.byte_tokenizer import ByteTokenizer
from moe_lightning.training.data.prepare import prepare_text


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
