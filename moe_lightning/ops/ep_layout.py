"""The layout of rows for all-to-alls between ranks: how many are sent and received, and in which order they lie.

Shapes: W ranks, E experts, L = E / W of a rank, C chunks, G groups of l = L / G experts, T tokens, K = top_k.

A chunk is one of C / G parts of the tokens for one group of each rank's experts. Slots are sorted into buckets,
by chunk, rank and expert; in each chunk the other ranks come in order and this one last.

These run once per layer, in a dispatcher that waits for counts on the host, so they are no ops of the torch library: no
compiler sees them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.ops import native
from moe_lightning.ops.buffer import Segment, empty


class EpLayout(NamedTuple):
    """This rank's part: experts [rank * L, (rank + 1) * L)."""

    rank: int
    ranks: int
    chunks: int
    local_experts: int
    groups: int
    """G: experts are divided before tokens, since each chunk that shares a group reads its weights again."""

    @classmethod
    def of(cls, rank: int, ranks: int, chunks: int, local_experts: int) -> EpLayout:
        """With as many groups as C and L allow."""
        return cls(rank, ranks, chunks, local_experts, math.gcd(chunks, local_experts))

    @property
    def chunk_experts(self) -> int:
        """l."""
        return self.local_experts // self.groups

    @property
    def buckets(self) -> int:
        """C W l."""
        return self.chunks * self.ranks * self.chunk_experts

    @property
    def peer_order(self) -> list[int]:
        """For each rank its position in a chunk."""
        return [self.ranks - 1 if r == self.rank else r - (r > self.rank) for r in range(self.ranks)]


def bucket_slots(expert_ids_TK: Tensor, layout: EpLayout) -> Tensor:
    """int32 (T, K): the bucket of each slot, -1 where it is dropped; parts of the tokens are neighbours, of equal size.

    Args:
        expert_ids_TK: int32; ids outside [0, E) are dropped slots.
        layout: of this rank.
    """
    tokens, top_k = expert_ids_TK.shape
    chunk_tokens = max(1, -(-tokens // (layout.chunks // layout.groups)))
    if _use_native("bucket_slots", expert_ids_TK, layout):
        expert_ids_TK = expert_ids_TK.contiguous()
        buckets_TK = torch.empty_like(expert_ids_TK)
        native.module("cuda").bucket_slots(
            native.place(expert_ids_TK), layout._asdict(),
            expert_ids=expert_ids_TK.data_ptr(), buckets=buckets_TK.data_ptr(),
            slots=tokens * top_k, chunk_slots=chunk_tokens * top_k,
        )  # fmt: skip
        return buckets_TK
    local, each, device = layout.local_experts, layout.chunk_experts, expert_ids_TK.device
    part_T1 = (torch.arange(tokens, dtype=torch.int32, device=device) // chunk_tokens)[:, None]
    valid_TK = (expert_ids_TK >= 0) & (expert_ids_TK < layout.ranks * local)
    ids_TK = expert_ids_TK.where(valid_TK, 0)
    peer_TK = torch.tensor(layout.peer_order, dtype=torch.int32, device=device)[ids_TK // local]
    chunk_TK = part_T1 * layout.groups + ids_TK % local // each
    buckets_TK = (chunk_TK * layout.ranks + peer_TK) * each + ids_TK % each
    return buckets_TK.where(valid_TK, -1)


def send_counts(bucket_offsets: Tensor, layout: EpLayout) -> Tensor:
    """int32 (W, C, l): rows for each expert; those for this rank's own are local.

    Args:
        bucket_offsets: int32, of the buckets, as `build_index` gives them.
        layout: of this rank.
    """
    shape = layout.ranks, layout.chunks, layout.chunk_experts
    if _use_native("send_counts", bucket_offsets, layout):
        send_WCL = native.allocator(bucket_offsets)(shape, (shape[1] * shape[2], shape[2], 1), torch.int32)
        native.module("cuda").send_counts(
            native.place(bucket_offsets), layout._asdict(),
            bucket_offsets=bucket_offsets.data_ptr(), send_counts=send_WCL.data_ptr(),
        )  # fmt: skip
        return send_WCL
    return bucket_offsets.diff().view(shape[1], shape[0], shape[2]).transpose(0, 1)[layout.peer_order]


def recv_offsets(send_WCL: Tensor, recv_WCL: Tensor, layout: EpLayout) -> tuple[Tensor, Tensor]:
    """Totals, int32 (2, C, W) on the host: rows to send and to receive; and offsets (C, l + 1) of each chunk's rows.

    Local rows are counted with both. On a GPU the totals may be read when the stream has passed this call.

    Args:
        send_WCL: int32, contiguous: rows for each expert.
        recv_WCL: the same of what each rank, this one included, sends to this rank's experts.
        layout: of this rank.
    """
    if _use_native("recv_offsets", send_WCL, layout):
        totals_2CW = torch.empty(2, layout.chunks, layout.ranks, dtype=torch.int32, pin_memory=True)
        length = layout.chunk_experts + 1
        offsets_CL = native.allocator(send_WCL)((layout.chunks, length), (length, 1), torch.int32)
        native.module("cuda").recv_offsets(
            native.place(send_WCL), layout._asdict(),
            send_counts=send_WCL.data_ptr(), recv_counts=recv_WCL.data_ptr(),
            totals=totals_2CW.data_ptr(), offsets=offsets_CL.data_ptr(),
        )  # fmt: skip
        return totals_2CW, offsets_CL
    totals_2WC = torch.stack([send_WCL, recv_WCL]).sum(3, dtype=torch.int32)
    offsets_CL = F.pad(recv_WCL.sum(0).cumsum(1, dtype=torch.int32), (1, 0))
    return totals_2WC.transpose(1, 2).to("cpu", non_blocking=True), offsets_CL


def recv_permutation(recv_WCL: Tensor, count: int, layout: EpLayout) -> Tensor:
    """int32 (count): for each row, by chunk, rank and expert, its position in its chunk by expert and rank.

    Args:
        recv_WCL: as for `recv_offsets`.
        count: rows received and local ones.
        layout: of this rank.
    """
    if _use_native("recv_permutation", recv_WCL, layout):
        perm_R = native.allocator(recv_WCL)((count,), (1,), torch.int32)
        native.module("cuda").recv_permutation(
            native.place(recv_WCL), layout._asdict(),
            recv_counts=recv_WCL.data_ptr(), perm=perm_R.data_ptr(),
        )  # fmt: skip
        return perm_R
    senders = [*(r for r in range(layout.ranks) if r != layout.rank), layout.rank]
    counts_CWL = recv_WCL[senders].transpose(0, 1)
    ends_CLW = counts_CWL.transpose(1, 2).flatten(1).cumsum(1).view(layout.chunks, -1, layout.ranks)
    begins = (ends_CLW.transpose(1, 2) - counts_CWL).flatten()
    counts = counts_CWL.flatten()
    within = torch.arange(count, device=counts.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (begins.repeat_interleave(counts) + within).int()


def _use_native(name: str, counts: Tensor, layout: EpLayout) -> bool:
    """There are kernels for GPUs; the CPU is as fast with torch's own."""
    if not counts.is_cuda:
        return False
    experts, limit = layout.ranks * layout.local_experts, None
    if experts > native.MAX_EXPERTS:
        limit = f"the kernels take num_experts <= {native.MAX_EXPERTS}, got num_experts={experts}"
    return native.use_native(f"ops.{name}", "auto", "cuda", limit)


# ---- rows received and local ones --------------------------------------------------------------------------
def merge_rows(first_RD: Tensor, second_OD: Tensor, perm: Tensor) -> Tensor:
    """Row i of the first tensor, then of the second, goes to ``rows[perm[i]]``, (R + O, D).

    Args:
        first_RD: rows of one source.
        second_OD: rows of another.
        perm: int32 (R + O), for each row of both its position.

    Raises:
        ValueError: there is not one position for each row.
    """
    of_first, width = first_RD.shape
    if of_first + second_OD.shape[0] != perm.shape[0] or width != second_OD.shape[1]:
        raise ValueError(
            "ops.merge_rows: rows (R, D) and (O, D) need R + O positions, got "
            f"{tuple(first_RD.shape)}, {tuple(second_OD.shape)}, perm={perm.shape[0]}"
        )
    rows = first_RD.new_empty((perm.shape[0], width))
    if not _is_native(rows):
        rows.index_copy_(0, perm[:of_first].long(), first_RD)
        return rows.index_copy_(0, perm[of_first:].long(), second_OD)
    first_RD, second_OD = first_RD.contiguous(), second_OD.contiguous()
    native.module("cuda").permute(
        native.place(rows),
        x=first_RD.data_ptr(), second_x=second_OD.data_ptr(), first_tokens=of_first,
        inverse_perm=perm.data_ptr(), rows=rows.data_ptr(), tokens=rows.shape[0], width=width, top_k=1,
        dtype=native.DTYPE_CODES[rows.dtype],
    )  # fmt: skip
    return rows


def split_rows(rows: Tensor, perm: Tensor, first: int, into: Segment | None = None) -> tuple[Tensor, Tensor]:
    """Undo `merge_rows`: the first R rows, (R, D), and the others, (O, D).

    Args:
        rows: (R + O, D).
        perm: int32 (R + O), for each row of both its position.
        first: R.
        into: memory for the second.

    Raises:
        ValueError: there is not one position for each row, or the segment does not hold the others.
    """
    count, width = rows.shape
    if count != perm.shape[0]:
        raise ValueError(f"ops.split_rows: rows (N, D) need N positions, got {tuple(rows.shape)}, perm={perm.shape[0]}")
    first_RD = rows.new_empty((first, width))
    second_OD = empty((count - first, width), rows, into)
    if second_OD.shape != (count - first, width):
        raise ValueError(
            f"ops.split_rows: the segment must hold the second rows, ({count - first}, {width}), "
            f"got {tuple(second_OD.shape)}"
        )
    if not _is_native(rows):
        torch.index_select(rows, 0, perm[:first].long(), out=first_RD)
        torch.index_select(rows, 0, perm[first:].long(), out=second_OD)
        return first_RD, second_OD
    rows = rows.contiguous()
    native.module("cuda").split_rows(
        native.place(rows),
        rows=rows.data_ptr(), inverse_perm=perm.data_ptr(), first=first_RD.data_ptr(),
        second=second_OD.data_ptr(), first_rows=first, tokens=count, width=width, top_k=1,
        dtype=native.DTYPE_CODES[rows.dtype],
    )  # fmt: skip
    return first_RD, second_OD


def _is_native(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype in native.DTYPE_CODES and native.use_native("ops.merge_rows", "auto", "cuda")
