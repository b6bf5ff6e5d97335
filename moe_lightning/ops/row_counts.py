"""How many rows leave a rank and come to it, for exchanges between ranks.

Shapes: W ranks, E experts, L = E / W of a rank, C chunks of tokens, T tokens, K = top_k. Slots are sorted into bins:
those of other ranks' experts by chunk, rank and expert, C (E - L) in all, then those of this rank's own, L.

These run once a layer, in a dispatcher that waits for counts on the host, so they are no ops of the torch library: no
compiler sees them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.ops import native


class Share(NamedTuple):
    """This rank's part: experts [rank * L, (rank + 1) * L)."""

    rank: int
    ranks: int
    chunks: int
    local_experts: int

    @property
    def remote_bins(self) -> int:
        """C (E - L)."""
        return self.chunks * (self.ranks - 1) * self.local_experts

    @property
    def bins(self) -> int:
        """Those of remote and of own experts."""
        return self.remote_bins + self.local_experts


def bin_slots(expert_ids_TK: Tensor, share: Share) -> Tensor:
    """int32 (T, K): the bin of each slot, -1 where it is dropped; C chunks of neighbouring tokens, ceil(T / C) each.

    Args:
        expert_ids_TK: int32; ids outside [0, E) are dropped slots.
        share: of this rank.
    """
    tokens, top_k = expert_ids_TK.shape
    chunk_tokens = max(1, -(-tokens // share.chunks))
    if _use_native("bin_slots", expert_ids_TK, share):
        expert_ids_TK = expert_ids_TK.contiguous()
        bins_TK = torch.empty_like(expert_ids_TK)
        native.module("cuda").bin_slots(
            expert_ids_TK.data_ptr(), bins_TK.data_ptr(), tokens * top_k, chunk_tokens * top_k, *share,
            *native.place(expert_ids_TK),
        )  # fmt: skip
        return bins_TK
    rank, ranks, _, local = share
    own_TK = expert_ids_TK - rank * local
    chunk_T1 = (torch.arange(tokens, dtype=torch.int32, device=expert_ids_TK.device) // chunk_tokens)[:, None]
    remote_TK = chunk_T1 * (ranks - 1) * local + torch.where(own_TK < 0, expert_ids_TK, expert_ids_TK - local)
    bins_TK = torch.where((own_TK >= 0) & (own_TK < local), share.remote_bins + own_TK, remote_TK)
    return torch.where((expert_ids_TK >= 0) & (expert_ids_TK < ranks * local), bins_TK, -1)


def count_leaving(bin_offsets: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """int32 (W, C, L): rows that leave for each expert, 0 for this rank's; and offsets (L + 1) of the rows that stay.

    Args:
        bin_offsets: int32, of the bins, as `build_index` gives them.
        share: of this rank.
    """
    rank, ranks, chunks, local = share
    if _use_native("count_leaving", bin_offsets, share):
        allocate = native.allocator(bin_offsets)
        leaving_WCL = allocate((ranks, chunks, local), (chunks * local, local, 1), torch.int32)
        own_offsets = allocate((local + 1,), (1,), torch.int32)
        native.module("cuda").count_leaving(
            bin_offsets.data_ptr(), leaving_WCL.data_ptr(), own_offsets.data_ptr(), *share, *native.place(bin_offsets)
        )
        return leaving_WCL, own_offsets
    remote = share.remote_bins
    counts_WCL = bin_offsets[: remote + 1].diff().view(chunks, ranks - 1, local).transpose(0, 1)
    none_1CL = counts_WCL.new_zeros(1, chunks, local)
    leaving_WCL = torch.cat([counts_WCL[:rank], none_1CL, counts_WCL[rank:]])
    return leaving_WCL, bin_offsets[remote:] - bin_offsets[remote]


def count_arriving(leaving_WCL: Tensor, arriving_WCL: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Totals, int32 (2, C, W) on the host: rows that leave and that come; and offsets (C, L + 1) of the rows that come.

    On a GPU the totals may be read when the stream has passed this call.

    Args:
        leaving_WCL: int32, contiguous: rows that leave for each expert.
        arriving_WCL: the same of what comes from each rank for this rank's experts.
        share: of this rank.
    """
    _, ranks, chunks, local = share
    if _use_native("count_arriving", leaving_WCL, share):
        totals_2CW = torch.empty(2, chunks, ranks, dtype=torch.int32, pin_memory=True)
        offsets_CL = native.allocator(leaving_WCL)((chunks, local + 1), (local + 1, 1), torch.int32)
        native.module("cuda").count_arriving(
            leaving_WCL.data_ptr(), arriving_WCL.data_ptr(), totals_2CW.data_ptr(), offsets_CL.data_ptr(), *share,
            *native.place(leaving_WCL),
        )  # fmt: skip
        return totals_2CW, offsets_CL
    totals_2WC = torch.stack([leaving_WCL, arriving_WCL]).sum(3, dtype=torch.int32)
    counts_CL = arriving_WCL.sum(0).cumsum(1, dtype=torch.int32)
    return totals_2WC.transpose(1, 2).to("cpu", non_blocking=True), torch.nn.functional.pad(counts_CL, (1, 0))


def _use_native(name: str, counts: Tensor, share: Share) -> bool:
    """There are kernels for GPUs; the CPU is as fast with torch's own."""
    if not counts.is_cuda:
        return False
    experts, limit = share.ranks * share.local_experts, None
    if experts > native.MAX_EXPERTS:
        limit = f"the kernels take num_experts <= {native.MAX_EXPERTS}, got num_experts={experts}"
    return native.use_native(f"ops.{name}", "auto", "cuda", limit)
