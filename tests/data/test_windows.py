import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.data.loaders import Windows, rank_share


def test_windows_are_side_by_side_and_leave_the_rest():
    windows = Windows(np.arange(11, dtype=np.uint16), seq_len=2, name="train")
    assert len(windows) == 3
    batch = windows.__getitems__([2, 0])
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert windows[1].tolist() == [3, 4, 5]


def test_fetch_gives_each_row_as_a_batch():
    windows = Windows(np.arange(12), seq_len=1, name="train")
    batches = list(windows.fetch(torch.tensor([[5, 1], [0, 3]])))
    assert torch.stack(batches).tolist() == [[[10, 11], [2, 3]], [[0, 1], [6, 7]]]


def test_too_little_text_names_split_tokens_and_need():
    windows = Windows(np.arange(100), seq_len=9, name="validation")
    windows.require(10, "less")
    with pytest.raises(
        ValueError,
        match=r"^data: the validation split is too short, got 100 tokens, needs 110 \(11 x 10\); .* or less$",
    ):
        windows.require(11, "less")


@given(count=st.integers(0, 60), batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
def test_shares_are_equal_disjoint_and_make_up_each_step(count, batch_size, world_size):
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    shares = [rank_share(order_N, batch_size, rank, world_size) for rank in range(world_size)]
    step = batch_size * world_size
    assert {share.shape for share in shares} == {(count // step, batch_size)}
    for i in range(count // step):
        together = torch.cat([share[i] for share in shares])
        assert together.sort().values.equal(order_N[i * step : (i + 1) * step].sort().values)
