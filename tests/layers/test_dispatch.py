"""Literal indices on inputs small enough to follow by eye."""

import pytest
import torch

from moe_lightning.layers.dispatch import MaskedDispatcher, PermuteDispatcher, local_dispatcher
from moe_lightning.ops import Selection

X_TD = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]])
IDS = [[2, 0], [0, 2], [3, 0]]
WEIGHTS = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]


def selection(ids=IDS, weights=WEIGHTS) -> Selection:
    ids_TK = torch.tensor(ids, dtype=torch.int32)
    load_E = torch.bincount(ids_TK[ids_TK >= 0], minlength=4).int()
    return Selection(torch.tensor(weights), ids_TK, load_E, torch.zeros((), dtype=torch.int32))


def unweighted(dispatched):
    """As for experts that do not fuse the combine weights."""
    return dispatched._replace(row_weights=None)


def test_permute_sorts_rows_by_expert_and_keeps_token_order_within():
    dispatcher = PermuteDispatcher(4, 2, may_drop=False)
    dispatched = dispatcher.dispatch(X_TD, selection())
    rows_ND = dispatched.rows
    assert dispatched.expert_offsets.tolist() == [0, 3, 3, 5, 6]
    perm_N = dispatched.handle.routing_index.perm_N
    assert perm_N.tolist() == [1, 2, 5, 0, 3, 4]  # expert 0: tokens 0, 1, 2; expert 2: 0, 1; expert 3: 2
    assert rows_ND[:, 0].tolist() == [10, 20, 30, 10, 20, 30]


def test_permute_combines_what_each_expert_made_of_a_row():
    dispatcher = PermuteDispatcher(4, 2, may_drop=False)
    dispatched = dispatcher.dispatch(X_TD, selection())
    rows_ND = dispatched.rows
    scale_N = torch.tensor([1.0, 1.0, 1.0, 100.0, 100.0, 1000.0])  # expert 0: x1, expert 2: x100, expert 3: x1000
    y_TD = dispatcher.combine(rows_ND * scale_N[:, None], unweighted(dispatched))
    assert y_TD.tolist() == [[75.25 * 10, 75.25 * 11], [50.5 * 20, 50.5 * 21], [30000, 31000]]


def test_masked_shows_every_row_to_every_expert_and_keeps_the_weights_in_a_mask():
    dispatcher = MaskedDispatcher(4)
    dispatched = dispatcher.dispatch(X_TD, selection())
    rows_ETD = dispatched.rows
    assert dispatched.expert_offsets is None
    assert dispatched.handle.tolist() == [[0.25, 0, 0.75, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]]
    assert rows_ETD.tolist() == [X_TD.tolist()] * 4
    assert rows_ETD.data_ptr() == X_TD.data_ptr()  # a view: nothing was moved


def test_masked_combines_by_the_mask():
    dispatcher = MaskedDispatcher(4)
    dispatched = dispatcher.dispatch(X_TD, selection())
    rows_ETD = dispatched.rows
    y_TD = dispatcher.combine(
        rows_ETD * torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None], unweighted(dispatched)
    )
    assert y_TD.tolist() == [[75.25 * 10, 75.25 * 11], [50.5 * 20, 50.5 * 21], [30000, 31000]]


@pytest.mark.parametrize("movement", ["permute", "masked"])
def test_dropped_slots_add_nothing(movement):
    dispatcher = local_dispatcher(movement, 4, 2, may_drop=True)
    dropped = selection([[2, -1], [-1, -1], [3, 0]], [[0.75, 0.0], [0.0, 0.0], [0.5, 0.5]])
    dispatched = dispatcher.dispatch(X_TD, dropped)
    rows = dispatched.rows
    assert dispatcher.combine(rows, unweighted(dispatched)).tolist() == [[7.5, 8.25], [0, 0], [30, 31]]


def test_permute_ignores_garbage_in_the_rows_of_dropped_slots():
    dispatcher = PermuteDispatcher(4, 2, may_drop=True)
    dropped = selection([[2, -1], [-1, -1], [3, 0]], [[0.75, 0.0], [0.0, 0.0], [0.5, 0.5]])
    dispatched = dispatcher.dispatch(X_TD, dropped)
    rows_ND = dispatched.rows
    assert dispatched.expert_offsets.tolist() == [0, 1, 1, 2, 3]
    rows_ND[3:] = torch.nan  # what an expert product leaves behind the last offset
    assert dispatcher.combine(rows_ND, unweighted(dispatched)).tolist() == [[7.5, 8.25], [0, 0], [30, 31]]


def test_round_trip_returns_the_input_for_weights_that_sum_to_one():
    x_TD = torch.randint(-8, 8, (37, 4)).float()
    ids_TK = torch.stack([torch.randperm(6)[:2] for _ in range(37)]).int()
    halves = selection(ids_TK.tolist(), [[0.5, 0.5]] * 37)
    for movement in ("permute", "masked"):
        dispatcher = local_dispatcher(movement, 6, 2, may_drop=False)
        dispatched = dispatcher.dispatch(x_TD, halves)
        rows = dispatched.rows
        assert dispatcher.combine(rows, unweighted(dispatched)).equal(x_TD)


def test_unknown_movement():
    with pytest.raises(ValueError, match=r"^dispatch: dispatch_mode must be 'permute' or 'masked', got 'teleport'"):
        local_dispatcher("teleport", 4, 2, may_drop=False)
