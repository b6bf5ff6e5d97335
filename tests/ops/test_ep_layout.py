"""Counts for exchanges between ranks: literal buckets, what every rank hears adds up, kernels as the reference.

Legend: W ranks, L experts of each, C chunks, l experts of a rank in a chunk, T tokens, K top_k.
"""

import pytest
import torch
from ops_checks import DEVICES

from moe_lightning.ops import build_index
from moe_lightning.ops.ep_layout import EpLayout, bucket_slots, recv_offsets, recv_permutation, send_counts

CASES = [  # tokens, top_k, ranks, chunks, local_experts
    (10, 2, 2, 1, 3),
    (10, 2, 2, 4, 3),
    (10, 2, 2, 6, 4),  # two groups, three parts of the tokens
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


def test_literal_bins_of_token_chunks():
    # Rank 1 of 3 with one expert each; chunks of two tokens. In each chunk: expert 0, expert 2, expert 1.
    layout = EpLayout.of(rank=1, ranks=3, chunks=2, local_experts=1)
    ids_TK = torch.tensor([[0, 2], [1, -1], [2, 0], [3, 1]]).int()
    assert bucket_slots(ids_TK, layout).tolist() == [[0, 1], [2, -1], [4, 3], [-1, 5]]


def test_literal_counts_of_expert_chunks():
    # Rank 1 of 3 with two experts each, a chunk for each. Chunk 0: experts 0, 4, 2; chunk 1: experts 1, 5, 3.
    layout = EpLayout.of(rank=1, ranks=3, chunks=2, local_experts=2)
    ids_TK = torch.tensor([[0, 2], [5, -1], [3, 4], [6, 1], [2, 1]]).int()
    buckets_TK = bucket_slots(ids_TK, layout)
    assert buckets_TK.tolist() == [[0, 2], [4, -1], [5, 1], [-1, 3], [2, 3]]
    send_WCL = send_counts(build_index(buckets_TK, layout.buckets).expert_offsets, layout)
    assert send_WCL.tolist() == [[[1], [2]], [[2], [1]], [[1], [1]]]
    recv_WCL = torch.tensor([[[3], [0]], [[2], [1]], [[0], [5]]]).int()
    totals_2CW, offsets_CL = recv_offsets(send_WCL, recv_WCL, layout)
    assert totals_2CW.tolist() == [[[1, 2, 1], [2, 1, 1]], [[3, 2, 0], [0, 1, 5]]]
    assert offsets_CL.tolist() == [[0, 5], [0, 6]]
    assert recv_permutation(recv_WCL, 11, layout).tolist() == [*range(5), *range(6)]  # one expert: as they come


def test_literal_places():
    # Rank 0 of 3, two experts: those of rank 1 (1 and 2 rows), of rank 2 (0 and 1), its own (2 and 1).
    layout = EpLayout.of(rank=0, ranks=3, chunks=1, local_experts=2)
    recv_WCL = torch.tensor([[[2, 1]], [[1, 2]], [[0, 1]]]).int()
    assert recv_permutation(recv_WCL, 7, layout).tolist() == [0, 3, 4, 5, 1, 2, 6]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_slot_is_counted_where_it_goes(case, device):
    tokens, top_k, ranks, chunks, local = case
    shares = [EpLayout.of(rank, ranks, chunks, local) for rank in range(ranks)]
    ids_WTK = [draw_ids(tokens, top_k, ranks * local, device) for _ in shares]
    bins_WTK = [bucket_slots(ids_TK, layout) for ids_TK, layout in zip(ids_WTK, shares, strict=True)]
    indices = [build_index(buckets_TK, layout.buckets) for buckets_TK, layout in zip(bins_WTK, shares, strict=True)]
    leaving_WWCL = torch.stack(
        [send_counts(index.expert_offsets, layout) for index, layout in zip(indices, shares, strict=True)]
    )
    for layout, ids_TK, buckets_TK in zip(shares, ids_WTK, bins_WTK, strict=True):
        assert ((buckets_TK < 0) == (ids_TK < 0)).all()
        for to in range(ranks):
            sent = int(((ids_TK >= to * local) & (ids_TK < (to + 1) * local)).sum())
            assert int(leaving_WWCL[layout.rank, to].sum()) == sent
        recv_WCL = leaving_WWCL[:, layout.rank].contiguous()
        totals_2CW, offsets_CL = recv_offsets(leaving_WWCL[layout.rank].contiguous(), recv_WCL, layout)
        if device == "cuda":
            torch.cuda.synchronize()
        assert totals_2CW[0].tolist() == leaving_WWCL[layout.rank].sum(2).T.tolist()
        assert totals_2CW[1].tolist() == recv_WCL.sum(2).T.tolist()
        assert (offsets_CL.diff() == recv_WCL.sum(0)).all()
        assert not offsets_CL[:, 0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_places_sort_rows_by_expert_and_keep_ranks_in_order(case, device):
    _, _, ranks, chunks, local = case
    layout = EpLayout.of(ranks // 2, ranks, chunks, local)
    recv_WCL = torch.randint(4, (ranks, chunks, layout.chunk_experts), device=device).int()
    senders = sorted(range(ranks), key=layout.peer_order.__getitem__)
    rows = [
        [(expert, seat) for seat, r in enumerate(senders) for expert, n in enumerate(counts[r]) for _ in range(n)]
        for counts in recv_WCL.transpose(0, 1).tolist()
    ]
    perm = recv_permutation(recv_WCL, sum(map(len, rows)), layout).split([len(chunk) for chunk in rows])
    for chunk, here in zip(rows, perm, strict=True):
        assert sorted(here.tolist()) == list(range(len(chunk)))
        assert [row for _, row in sorted(zip(here.tolist(), chunk, strict=True))] == sorted(chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case):
    tokens, top_k, ranks, chunks, local = case
    for rank in {0, ranks // 2, ranks - 1}:
        layout = EpLayout.of(rank, ranks, chunks, local)
        ids_TK = draw_ids(tokens, top_k, ranks * local, "cuda")
        buckets_TK = bucket_slots(ids_TK, layout)
        assert torch.equal(buckets_TK.cpu(), bucket_slots(ids_TK.cpu(), layout))
        offsets = build_index(buckets_TK, layout.buckets).expert_offsets
        assert torch.equal(send_counts(offsets, layout).cpu(), send_counts(offsets.cpu(), layout))
        counts_WCL = torch.randint(1000, (2, ranks, chunks, layout.chunk_experts)).int()
        found = recv_offsets(counts_WCL[0].cuda(), counts_WCL[1].cuda(), layout)
        torch.cuda.synchronize()
        for got, expected in zip(found, recv_offsets(*counts_WCL, layout), strict=True):
            assert torch.equal(got.cpu(), expected)
        count = int(counts_WCL[1].sum())
        expected = recv_permutation(counts_WCL[1], count, layout)
        assert torch.equal(recv_permutation(counts_WCL[1].cuda(), count, layout).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_more_experts_than_kernels_take(device):
    layout = EpLayout.of(rank=0, ranks=2, chunks=1, local_experts=600)
    assert bucket_slots(torch.tensor([[0, 1199]], device=device).int(), layout).tolist() == [[600, 599]]
