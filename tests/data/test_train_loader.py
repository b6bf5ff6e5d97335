from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.data.loaders import TrainLoader, Windows


def make(count=10, batch_size=2, seq_len=3, num_workers=0, **options) -> TrainLoader:
    tokens = np.arange(count * (seq_len + 1), dtype=np.uint16)
    return TrainLoader(Windows(tokens, seq_len, "train", num_workers), batch_size, **options)


def take(loader: TrainLoader, count: int) -> list:
    """``count`` batches, over as many epochs as it takes."""
    passes = chain.from_iterable(iter(loader) for _ in range(count))
    return [batch.tolist() for batch in islice(passes, count)]


def test_batch_is_int64_of_seq_len_plus_one():
    batch = next(iter(make()))
    assert batch.shape == (2, 4)
    assert batch.dtype == torch.int64


def test_epoch_holds_every_window_once_and_the_next_is_shuffled_anew():
    loader = make()
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 5
    assert torch.cat(first).sort(0).values.equal(torch.arange(40).view(10, 4))
    assert torch.cat(second).sort(0).values.equal(torch.arange(40).view(10, 4))
    assert not torch.cat(first).equal(torch.cat(second))


def test_order_depends_on_seed_and_epoch_alone():
    assert take(make(), 12) == take(make(), 12)
    assert take(make(seed=1), 5) != take(make(), 5)
    assert take(make(), 10)[5:] not in (take(make(seed=1), 5), take(make(), 5))


@given(st.integers(0, 12), st.integers(0, 12))
def test_resume_anywhere_gives_exactly_the_next_batch(before, after):
    interrupted, resumed = make(), make(seed=9)
    whole = take(make(), before + after)
    assert take(interrupted, before) == whole[:before]
    resumed.load_state_dict(interrupted.state_dict())
    assert take(resumed, after) == whole[before:]


@given(st.integers(0, 12))
def test_iterators_that_are_never_used_change_nothing(before):
    loader = make()
    take(loader, before)
    iter(loader)
    iter(loader)
    assert take(loader, 3) == take(make(), before + 3)[before:]


def test_resume_keeps_the_steps_when_the_batch_is_spread_over_more_ranks():
    one = make(batch_size=4, count=20)
    take(one, 2)
    halves = []
    for rank in range(2):
        half = make(batch_size=2, count=20, rank=rank, world_size=2)
        half.load_state_dict(one.state_dict())
        halves.append(take(half, 4))
    for step, left, right in zip(take(one, 4), *halves, strict=True):
        assert sorted(step) == sorted(left + right)


def test_broken_off_pass_is_continued_and_the_next_is_as_long():
    loader = make()
    whole = take(make(), 8)
    assert take(loader, 3) == whole[:3]
    assert [batch.tolist() for batch in loader] == whole[3:]


def test_batch_that_was_not_trained_on_is_given_again():
    unfinished = 0
    loader = make(unfinished=lambda: unfinished)
    whole = take(make(), 5)
    take(loader, 3)
    unfinished = 1
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 3) == whole[2:]


def test_workers_change_nothing_not_even_the_place():
    whole = take(make(), 5)
    loader = make(num_workers=1)
    assert take(loader, 2) == whole[:2]
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 3) == whole[2:]


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    take(make(), 12)
    assert torch.get_rng_state().equal(before)


def test_state_is_plain():
    assert {type(value) for value in make(fingerprint="f").state_dict().values()} == {int, str}


@pytest.mark.parametrize(
    ("other", "name"),
    [({"batch_size": 3}, "global_batch_size"), ({"seq_len": 4}, "seq_len"), ({"fingerprint": "b"}, "text")],
)
def test_place_in_other_data_is_refused(other, name):
    state = make(**{"fingerprint": "a"}).state_dict()
    with pytest.raises(ValueError, match=rf"^data: resume needs the checkpoint's {name}, got .*, saved .*; use"):
        make(**{"fingerprint": "a", **other}).load_state_dict(state)


def test_less_than_a_batch_on_every_rank_is_an_error():
    make(count=4, world_size=2)
    with pytest.raises(ValueError, match=r"the train split is too short, got 12 tokens, needs 16 \(4 x 4\)"):
        make(count=3, world_size=2)
