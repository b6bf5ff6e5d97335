"""How many rows leave a rank and come to it, and where they stand, for exchanges between ranks.

Shapes: W ranks, E experts, L = E / W of a rank, C chunks, G groups of l = L / G experts, T tokens, K = top_k.

A chunk is one of C / G parts of the tokens for one group of each rank's experts. Slots are sorted into bins, by chunk,
rank and expert; in each chunk the other ranks stand in order and this one last.

These run once a layer, in a dispatcher that waits for counts on the host, so they are no ops of the torch library: no
compiler sees them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.ops import native


class Share(NamedTuple):
    """This rank's part: experts [rank * L, (rank + 1) * L)."""

    rank: int
    ranks: int
    chunks: int
    local_experts: int
    groups: int
    """G: experts are cut before tokens, since each chunk that shares a group reads its weights again."""

    @classmethod
    def of(cls, rank: int, ranks: int, chunks: int, local_experts: int) -> Share:
        """With as many groups as C and L allow."""
        return cls(rank, ranks, chunks, local_experts, math.gcd(chunks, local_experts))

    @property
    def chunk_experts(self) -> int:
        """l."""
        return self.local_experts // self.groups

    @property
    def bins(self) -> int:
        """C W l."""
        return self.chunks * self.ranks * self.chunk_experts

    @property
    def seats(self) -> list[int]:
        """For each rank its place in a chunk."""
        return [self.ranks - 1 if r == self.rank else r - (r > self.rank) for r in range(self.ranks)]


def bin_slots(expert_ids_TK: Tensor, share: Share) -> Tensor:
    """int32 (T, K): the bin of each slot, -1 where it is dropped; parts of the tokens are neighbours, of equal size.

    Args:
        expert_ids_TK: int32; ids outside [0, E) are dropped slots.
        share: of this rank.
    """
    tokens, top_k = expert_ids_TK.shape
    part_tokens = max(1, -(-tokens // (share.chunks // share.groups)))
    if _use_native("bin_slots", expert_ids_TK, share):
        expert_ids_TK = expert_ids_TK.contiguous()
        bins_TK = torch.empty_like(expert_ids_TK)
        native.module("cuda").bucket_slots(
            native.place(expert_ids_TK), expert_ids=expert_ids_TK.data_ptr(), buckets=bins_TK.data_ptr(),
            slots=tokens * top_k, chunk_slots=part_tokens * top_k, **share._asdict(),
        )  # fmt: skip
        return bins_TK
    local, each, device = share.local_experts, share.chunk_experts, expert_ids_TK.device
    part_T1 = (torch.arange(tokens, dtype=torch.int32, device=device) // part_tokens)[:, None]
    valid_TK = (expert_ids_TK >= 0) & (expert_ids_TK < share.ranks * local)
    ids_TK = expert_ids_TK.where(valid_TK, 0)
    seat_TK = torch.tensor(share.seats, dtype=torch.int32, device=device)[ids_TK // local]
    chunk_TK = part_T1 * share.groups + ids_TK % local // each
    bins_TK = (chunk_TK * share.ranks + seat_TK) * each + ids_TK % each
    return bins_TK.where(valid_TK, -1)


def count_leaving(bin_offsets: Tensor, share: Share) -> Tensor:
    """int32 (W, C, l): rows for each expert; those for this rank's own stay.

    Args:
        bin_offsets: int32, of the bins, as `build_index` gives them.
        share: of this rank.
    """
    shape = share.ranks, share.chunks, share.chunk_experts
    if _use_native("count_leaving", bin_offsets, share):
        leaving_WCL = native.allocator(bin_offsets)(shape, (shape[1] * shape[2], shape[2], 1), torch.int32)
        native.module("cuda").send_counts(
            native.place(bin_offsets), bucket_offsets=bin_offsets.data_ptr(), send_counts=leaving_WCL.data_ptr(),
            **share._asdict(),
        )  # fmt: skip
        return leaving_WCL
    return bin_offsets.diff().view(shape[1], shape[0], shape[2]).transpose(0, 1)[share.seats]


def count_arriving(leaving_WCL: Tensor, arriving_WCL: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Totals, int32 (2, C, W) on the host: rows that leave and that come; and offsets (C, l + 1) of each chunk's rows.

    Rows that stay are counted with both. On a GPU the totals may be read when the stream has passed this call.

    Args:
        leaving_WCL: int32, contiguous: rows for each expert.
        arriving_WCL: the same of what comes from each rank for this rank's experts, from itself too.
        share: of this rank.
    """
    if _use_native("count_arriving", leaving_WCL, share):
        totals_2CW = torch.empty(2, share.chunks, share.ranks, dtype=torch.int32, pin_memory=True)
        length = share.chunk_experts + 1
        offsets_CL = native.allocator(leaving_WCL)((share.chunks, length), (length, 1), torch.int32)
        native.module("cuda").recv_offsets(
            native.place(leaving_WCL), send_counts=leaving_WCL.data_ptr(), recv_counts=arriving_WCL.data_ptr(),
            totals=totals_2CW.data_ptr(), offsets=offsets_CL.data_ptr(), **share._asdict(),
        )  # fmt: skip
        return totals_2CW, offsets_CL
    totals_2WC = torch.stack([leaving_WCL, arriving_WCL]).sum(3, dtype=torch.int32)
    offsets_CL = F.pad(arriving_WCL.sum(0).cumsum(1, dtype=torch.int32), (1, 0))
    return totals_2WC.transpose(1, 2).to("cpu", non_blocking=True), offsets_CL


def row_places(arriving_WCL: Tensor, count: int, share: Share) -> Tensor:
    """int32 (count): for each row, by chunk, rank and expert, where in its chunk it stands by expert and rank.

    Args:
        arriving_WCL: as for `count_arriving`.
        count: rows that come and that stay.
        share: of this rank.
    """
    if _use_native("row_places", arriving_WCL, share):
        places_R = native.allocator(arriving_WCL)((count,), (1,), torch.int32)
        native.module("cuda").recv_permutation(
            native.place(arriving_WCL), recv_counts=arriving_WCL.data_ptr(), perm=places_R.data_ptr(),
            **share._asdict(),
        )  # fmt: skip
        return places_R
    seated = [*(r for r in range(share.ranks) if r != share.rank), share.rank]
    counts_CWL = arriving_WCL[seated].transpose(0, 1)
    ends_CLW = counts_CWL.transpose(1, 2).flatten(1).cumsum(1).view(share.chunks, -1, share.ranks)
    begins = (ends_CLW.transpose(1, 2) - counts_CWL).flatten()
    counts = counts_CWL.flatten()
    within = torch.arange(count, device=counts.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (begins.repeat_interleave(counts) + within).int()


def _use_native(name: str, counts: Tensor, share: Share) -> bool:
    """There are kernels for GPUs; the CPU is as fast with torch's own."""
    if not counts.is_cuda:
        return False
    experts, limit = share.ranks * share.local_experts, None
    if experts > native.MAX_EXPERTS:
        limit = f"the kernels take num_experts <= {native.MAX_EXPERTS}, got num_experts={experts}"
    return native.use_native(f"ops.{name}", "auto", "cuda", limit)
