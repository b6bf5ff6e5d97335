import numpy as np
import pytest
import torch

from moe_lightning.training.data.eval_loader import EvalLoader
from moe_lightning.training.data.windows import Windows


def windows(count: int) -> Windows:
    return Windows(np.arange(2 * count), seq_len=1, name="validation")


def starts(loader: EvalLoader) -> list[list[int]]:
    """Which windows each batch has."""
    return [(batch[:, 0] // 2).tolist() for batch in loader]


def test_order_is_that_of_the_text_every_time():
    loader = EvalLoader(windows(7), 2)
    assert len(loader) == 3
    assert starts(loader) == starts(loader) == [[0, 1], [2, 3], [4, 5]]


def test_limit_is_spread_over_the_split():
    assert starts(EvalLoader(windows(100), 2, max_tokens=4)) == [[0, 25], [50, 75]]
    assert starts(EvalLoader(windows(4), 2, max_tokens=1000)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("max_tokens", [None, 1, 12])
def test_ranks_get_equal_and_disjoint_batches(count, max_tokens):
    ranks = [starts(EvalLoader(windows(count), 3, max_tokens=max_tokens, rank=r, world_size=2)) for r in (0, 1)]
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
