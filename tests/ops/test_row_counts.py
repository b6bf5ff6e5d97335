"""Counts for exchanges between ranks: literal bins, what every rank hears adds up, kernels as the reference.

Legend: W ranks, L experts of each, C chunks, T tokens, K top_k.
"""

import pytest
import torch
from ops_checks import DEVICES

from moe_lightning.ops import build_index
from moe_lightning.ops.row_counts import Share, bin_slots, count_arriving, count_leaving

CASES = [  # tokens, top_k, ranks, chunks, local_experts
    (10, 2, 2, 1, 3),
    (10, 2, 2, 4, 3),
    (3, 1, 3, 5, 1),  # more chunks than tokens
    (0, 2, 2, 2, 4),
    (70, 8, 4, 2, 16),
    (4096, 2, 2, 4, 32),
    (33, 3, 1, 1, 70),  # no other rank
    (500, 2, 16, 2, 32),
]


def draw_ids(tokens, top_k, experts, device):
    ids_TK = torch.randint(experts, (tokens, top_k), device=device).int()
    return torch.where(torch.rand(tokens, top_k, device=device) < 0.1, -1, ids_TK)


def test_literal_bins():
    # Rank 1 of 3 with two experts each; chunks of two tokens. Remote experts 0, 1, 4, 5 have bins 0-3 and 4-7.
    share = Share(rank=1, ranks=3, chunks=2, local_experts=2)
    ids_TK = torch.tensor([[0, 2], [5, -1], [3, 4], [6, 1]]).int()
    assert bin_slots(ids_TK, share).tolist() == [[0, 8], [3, -1], [9, 6], [-1, 5]]
    leaving_WCL, own_offsets = count_leaving(build_index(bin_slots(ids_TK, share), share.bins).expert_offsets, share)
    assert leaving_WCL.tolist() == [[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[0, 1], [1, 0]]]
    assert own_offsets.tolist() == [0, 1, 2]
    arriving_WCL = torch.tensor([[[3, 1], [0, 0]], [[0, 0], [0, 0]], [[2, 0], [0, 5]]]).int()
    totals_2CW, offsets_CL = count_arriving(leaving_WCL, arriving_WCL, share)
    assert totals_2CW.tolist() == [[[1, 0, 1], [1, 0, 1]], [[4, 0, 2], [0, 0, 5]]]
    assert offsets_CL.tolist() == [[0, 5, 6], [0, 0, 5]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_slot_is_counted_where_it_goes(case, device):
    tokens, top_k, ranks, chunks, local = case
    shares = [Share(rank, ranks, chunks, local) for rank in range(ranks)]
    ids_WTK = [draw_ids(tokens, top_k, ranks * local, device) for _ in shares]
    bins_WTK = [bin_slots(ids_TK, share) for ids_TK, share in zip(ids_WTK, shares, strict=True)]
    indices = [build_index(bins_TK, share.bins) for bins_TK, share in zip(bins_WTK, shares, strict=True)]
    counted = [count_leaving(index.expert_offsets, share) for index, share in zip(indices, shares, strict=True)]
    leaving_WWCL = torch.stack([leaving_WCL for leaving_WCL, _ in counted])
    for share, ids_TK, bins_TK, (_, own_offsets) in zip(shares, ids_WTK, bins_WTK, counted, strict=True):
        assert ((bins_TK < 0) == (ids_TK < 0)).all()
        mine_TK = ids_TK - share.rank * local
        assert own_offsets.diff().tolist() == [int((mine_TK == e).sum()) for e in range(local)]
        assert not leaving_WWCL[share.rank, share.rank].any()
        for to in range(ranks):
            sent = int(((ids_TK >= to * local) & (ids_TK < (to + 1) * local)).sum())
            assert int(leaving_WWCL[share.rank, to].sum()) == (0 if to == share.rank else sent)
        totals_2CW, offsets_CL = count_arriving(
            leaving_WWCL[share.rank].contiguous(), leaving_WWCL[:, share.rank].contiguous(), share
        )
        if device == "cuda":
            torch.cuda.synchronize()
        assert totals_2CW[0].tolist() == leaving_WWCL[share.rank].sum(2).T.tolist()
        assert totals_2CW[1].tolist() == leaving_WWCL[:, share.rank].sum(2).T.tolist()
        counts_CL = leaving_WWCL[:, share.rank].sum(0)
        assert (offsets_CL.diff() == counts_CL).all()
        assert not offsets_CL[:, 0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case):
    tokens, top_k, ranks, chunks, local = case
    for rank in {0, ranks // 2, ranks - 1}:
        share = Share(rank, ranks, chunks, local)
        ids_TK = draw_ids(tokens, top_k, ranks * local, "cuda")
        bins_TK = bin_slots(ids_TK, share)
        assert torch.equal(bins_TK.cpu(), bin_slots(ids_TK.cpu(), share))
        offsets = build_index(bins_TK, share.bins).expert_offsets
        for got, expected in zip(count_leaving(offsets, share), count_leaving(offsets.cpu(), share), strict=True):
            assert torch.equal(got.cpu(), expected)
        counts_WCL = torch.randint(1000, (2, ranks, chunks, local)).int()
        found = count_arriving(counts_WCL[0].cuda(), counts_WCL[1].cuda(), share)
        torch.cuda.synchronize()
        for got, expected in zip(found, count_arriving(*counts_WCL, share), strict=True):
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_more_experts_than_kernels_take(device):
    share = Share(rank=0, ranks=2, chunks=1, local_experts=600)
    assert bin_slots(torch.tensor([[0, 1199]], device=device).int(), share).tolist() == [[600, 599]]
