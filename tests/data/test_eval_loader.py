import numpy as np
import pytest
import torch

from moe_lightning.data.loaders import EvalLoader, Windows


def windows(count: int) -> Windows:
    return Windows(np.arange(2 * count), seq_len=1, name="validation")


def starts(loader: EvalLoader) -> list[list[int]]:
    """Which windows each batch has."""
    return [(batch[:, 0] // 2).tolist() for batch in loader]


def test_order_is_that_of_the_text_every_time():
    loader = EvalLoader(windows(7), 2)
    assert len(loader) == 4
    assert starts(loader) == starts(loader) == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("batch_size", [1, 7, 8, 200, 394, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("max_tokens", "chosen"), [(None, range(394)), (100, [i * 394 // 100 for i in range(100)])])
def test_every_window_once_whatever_the_batch_and_the_ranks(batch_size, world_size, max_tokens, chosen):
    options = {"max_tokens": max_tokens, "world_size": world_size}
    ranks = [starts(EvalLoader(windows(394), batch_size, rank=rank, **options)) for rank in range(world_size)]
    assert sorted(start for batches in ranks for batch in batches for start in batch) == list(chosen)
    assert len({len(batches) for batches in ranks}) == 1  # a step is a collective
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
    for step in zip(*[batches[:-1] for batches in ranks], strict=True):
        assert len({len(batch) for batch in step}) == 1  # all but the last are full


def test_a_rank_for_which_nothing_is_left_has_an_empty_batch():
    assert starts(EvalLoader(windows(5), 2, rank=0, world_size=2)) == [[0, 2], [4]]
    assert starts(EvalLoader(windows(5), 2, rank=1, world_size=2)) == [[1, 3], []]
    *_, last = EvalLoader(windows(5), 2, rank=1, world_size=2)
    assert (last.shape, last.dtype) == ((0, 2), torch.int64)


def test_limit_is_spread_over_the_split():
    assert starts(EvalLoader(windows(100), 2, max_tokens=4)) == [[0, 25], [50, 75]]
    assert starts(EvalLoader(windows(4), 2, max_tokens=1000)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("max_tokens", [None, 1, 12])
def test_full_batches_are_equal_and_disjoint_on_all_ranks(count, max_tokens):
    options = {"max_tokens": max_tokens, "full_batches": True, "world_size": 2}
    ranks = [starts(EvalLoader(windows(count), 3, rank=r, **options)) for r in (0, 1)]
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]] != []
    seen = [start for batches in ranks for batch in batches for start in batch]
    assert len(set(seen)) == len(seen)


def test_less_than_a_batch_is_one_smaller_batch():
    assert starts(EvalLoader(windows(3), 16)) == [[0, 1, 2]]


def test_less_than_a_window_a_rank_is_an_error():
    with pytest.raises(ValueError, match=r"^data: the validation split is too short, got 2 tokens, needs 4"):
        EvalLoader(windows(1), 1, world_size=2)


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    list(EvalLoader(windows(8), 2))
    assert torch.get_rng_state().equal(before)
