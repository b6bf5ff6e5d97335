"""Rows through other ranks' memory: where they go, what comes back, and that it is what one rank would have.

Legend: W ranks, E experts, T tokens, K top_k, D width.
"""

import pytest
import torch
from ops_checks import DEVICES, FLOATS
from symmetric_ranks import Ranks, draw_ids

from moe_lightning.ops import build_index, permute, sum_rows
from moe_lightning.ops.library import accum_dtype
from moe_lightning.ops.symmetric import get

CASES = [  # tokens of each rank, experts, top_k, share of dropped slots, the rank all of whose tokens want one expert
    ((33,), 6, 2, 0.0, None),
    ((33, 20), 6, 2, 0.0, None),
    ((0, 17), 4, 3, 0.3, None),
    ((40, 40), 8, 1, 0.0, 1),
    ((0, 0), 4, 2, 0.0, None),
    ((300, 1, 0, 64), 64, 8, 0.1, 0),
    ((70, 70), 1024, 32, 0.0, None),
]


def capacity_of(counts, experts, top_k):
    return len(counts) * max(counts) * min(top_k, experts // len(counts))


def test_literal_places():
    ranks = Ranks(2, 4, "cpu")
    ids_WTK = [torch.tensor([[0, 2], [3, 0]]).int(), torch.tensor([[2, -1], [1, 3]]).int()]
    routes, offsets = ranks.routes(ids_WTK, capacity=8)
    assert [o.tolist() for o in offsets] == [[0, 2, 3], [0, 2, 4]]
    rows = ranks.tensors((8, 1), torch.float32)
    x_WTD = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    ranks.put(x_WTD, [None, None], routes, rows)
    # rank 0: expert 0 has both tokens of rank 0, expert 1 one of rank 1; rank 1: expert 2, then expert 3
    assert [r.own[: o[-1], 0].tolist() for r, o in zip(rows, offsets, strict=True)] == [[1, 2, 4], [1, 3, 2, 4]]
    sums = [get(rows[rank], None, routes[rank], torch.float32)[0] for rank in (0, 1)]
    assert [y_TD[:, 0].tolist() for y_TD in sums] == [[2, 4], [3, 8]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 24, 100, 520])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_come_sorted_by_expert_then_rank_and_go_back_as_sums(case, width, dtype, device):
    counts, experts, top_k, drop, hot = case
    ranks, capacity = Ranks(len(counts), experts, device), capacity_of(*case[:3])
    rows = ranks.tensors((capacity, width), dtype)
    row_weights = ranks.tensors((capacity,), accum_dtype(dtype))
    for _ in range(3):  # turns take the halves of the counts in turn
        ids_WTK = draw_ids(counts, experts, top_k, device, drop, hot)
        x_WTD = [torch.randn(tokens, width, device=device).to(dtype) for tokens in counts]
        weights_WTK = [torch.rand(t, top_k, dtype=accum_dtype(dtype), device=device) for t in counts]
        routes, offsets = ranks.routes(ids_WTK, capacity)
        ranks.put(x_WTD, weights_WTK, routes, rows, row_weights)

        # One rank that has all tokens, in the order of the ranks, sorts them alike.
        ids_TK, x_TD, weights_TK = (torch.cat(each) for each in (ids_WTK, x_WTD, weights_WTK))
        index = build_index(ids_TK, experts)
        all_offsets = torch.cat([o[:-1] + sum(int(p[-1]) for p in offsets[:r]) for r, o in enumerate(offsets)])
        assert all_offsets.equal(index.expert_offsets[:-1])
        kept = int(index.expert_offsets[-1])
        whole_ND = torch.cat([r.own[: o[-1]] for r, o in zip(rows, offsets, strict=True)])
        assert whole_ND.equal(permute(x_TD, index, top_k)[:kept])
        whole_N = torch.cat([w.own[: o[-1]] for w, o in zip(row_weights, offsets, strict=True)])
        assert whole_N.equal(weights_TK.flatten()[index.perm_N[:kept]])

        ranks.barrier()
        pulled = [get(rows[r], row_weights[r], routes[r], dtype) for r in range(ranks.world)]
        rows_ND = torch.zeros(ids_TK.numel(), width, dtype=dtype, device=device)
        rows_ND[:kept] = whole_ND
        expected_TD = sum_rows(rows_ND, index, top_k, may_drop=True)
        y_TD, scalars_TK = (torch.cat(each) for each in zip(*pulled, strict=True))
        torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=0)
        assert scalars_TK.equal(torch.where(ids_TK < 0, 0, weights_TK))
        alone = [get(rows[r], None, routes[r], dtype) for r in range(ranks.world)]
        assert torch.cat([y for y, _ in alone]).equal(y_TD)
        alone = [get(None, row_weights[r], routes[r], dtype) for r in range(ranks.world)]
        assert torch.cat([scalars for _, scalars in alone]).equal(scalars_TK)
        ranks.barrier()


@pytest.mark.parametrize("device", DEVICES)
def test_garbage_behind_the_last_row_and_in_dropped_slots_is_not_read(device):
    ranks = Ranks(2, 4, device)
    ids_WTK = draw_ids((50, 50), 4, 2, device, drop=0.5)
    routes, offsets = ranks.routes(ids_WTK, 200)
    rows = ranks.tensors((200, 16), torch.float32)
    for tensor in rows:
        tensor.own.fill_(torch.nan)
    x_WTD = [torch.randn(50, 16, device=device) for _ in range(2)]
    ranks.put(x_WTD, [None, None], routes, rows)
    ranks.barrier()
    for rank in range(2):
        assert rows[rank].own[offsets[rank][-1] :].isnan().all()
        y_TD, _ = get(rows[rank], None, routes[rank], torch.float32)
        live_T = (ids_WTK[rank] >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(y_TD, x_WTD[rank] * live_T, rtol=0, atol=0)


def test_what_a_kernel_reports_is_said_in_words():
    [signals] = Ranks(1, 2, "cpu", timeout_seconds=7).signals
    assert signals.error() is None
    signals._error = torch.tensor([1, 3])
    assert signals.error() == (
        "dispatch: rank 3 of the group did not come within timeout_seconds=7; look at that rank's log"
    )
    for kind in (2, 3):
        signals._error = torch.tensor([kind, 1])
        assert "rank 1 of the group" in signals.error()


def test_rows_that_do_not_fit_and_buffers_that_differ_are_said():
    ranks = Ranks(2, 4, "cpu")
    with pytest.raises(
        ValueError, match=r"^ops.exchange_counts: rows must fit .* rows=\[20, 0\], capacity=19, .*\[0, 0\]"
    ):
        ranks.routes([torch.zeros(10, 1).int()] * 2, 19)
