"""Experts spread over the ranks of a group: rows go to their expert's rank and back by all-to-all.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts per rank, C chunks, G groups of
l = L / G experts, D d_model.

A chunk is a group of each rank's experts, and where these are too few to be divided by C, a part of the tokens as well
(`ops.ep_layout`). The experts work on one chunk while the next is received and the last is sent back. A rank's own
rows stay: they are merged with those received for the same experts, so that each weight is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moe_lightning.expert_parallel.all_to_all_autograd import (
    ReceiveBuffers,
    combine_start,
    combine_wait,
    dispatch_start,
    dispatch_wait,
    split,
)
from moe_lightning.expert_parallel.collectives import AllToAll, CommHook, check_splits, local_experts
from moe_lightning.layers.dispatch import Dispatched, Dispatcher
from moe_lightning.layers.experts import Experts, compute_dtype, expert_rows
from moe_lightning.layers.phases import Hook, Phase, no_hook, run_step
from moe_lightning.ops import RoutingIndex, Selection, build_index, permute, unpermute
from moe_lightning.ops.buffer import Segment, SegmentedBuffer, assemble
from moe_lightning.ops.ep_layout import EpLayout, bucket_slots, recv_offsets, recv_permutation, send_counts
from moe_lightning.utils.errors import annotate_error

#: Blocks of NCCL's kernels, at most, between GPUs of one host. The expert kernels take every multiprocessor and keep it
#: until they end: where transfers overlap they leave as many free, or either would wait for the other.
NCCL_BLOCKS = 24


# ---- split sizes -----------------------------------------------------------------------------------------
class PendingSplits(NamedTuple):
    """Counts of rows to send and to receive, on their way to the host."""

    recv_WCL: Tensor
    """int32 (W, C, l): rows that each rank sends to each expert of this one."""
    totals_2CW: Tensor
    """int32 on the host: rows to send and to receive, local ones in both."""
    offsets: tuple[Tensor, ...]
    """For each chunk int32 (l + 1): where each expert's rows begin."""
    copied: torch.cuda.Event | None
    """On a GPU: the totals may be read."""


class Splits(NamedTuple):
    """For each chunk, rows to send to each rank and to receive from it, without local ones; and these."""

    send: list[list[int]]
    recv: list[list[int]]
    local: list[int]

    @property
    def segments(self) -> list[int]:
        """For each chunk the rows to send and the local ones, one after the other."""
        return [count for send, local in zip(self.send, self.local, strict=True) for count in (sum(send), local)]


def exchange_counts(
    group: dist.ProcessGroup, send_WCL: Tensor, layout: EpLayout, async_op: bool = False
) -> PendingSplits:
    """Start to learn how many rows come: a collective. On a GPU the host does not wait.

    Args:
        group: the ranks.
        send_WCL: int32 (W, C, l), rows of this rank for the experts of each.
        layout: of this rank.
        async_op: as of the rows' all-to-alls, which the counts must not run alongside: one communicator, one stream.
    """
    recv_WCL = torch.empty_like(send_WCL)
    with annotate_error("dispatch/counts"):
        work = dist.all_to_all_single(recv_WCL, send_WCL, group=group, async_op=async_op)
        if work is not None:
            work.wait()
    totals_2CW, offsets_CL = recv_offsets(send_WCL, recv_WCL, layout)
    copied = torch.cuda.Event() if offsets_CL.is_cuda else None
    if copied is not None:
        copied.record()
    return PendingSplits(recv_WCL, totals_2CW, offsets_CL.unbind(), copied)


def wait_splits(pending: PendingSplits, rank: int) -> Splits:
    """Wait on the host for the counts of all ranks."""
    if pending.copied is not None:
        pending.copied.synchronize()
    send, recv = pending.totals_2CW.tolist()
    local = [chunk[rank] for chunk in send]
    for chunk in (*send, *recv):
        chunk[rank] = 0
    return Splits(send, recv, local)


def recv_perms(pending: PendingSplits, splits: Splits, layout: EpLayout) -> tuple[Tensor, ...]:
    """For each chunk int32: where each row, received ones by rank and expert, then local ones, goes by expert."""
    counts = [sum(recv) + local for recv, local in zip(splits.recv, splits.local, strict=True)]
    return recv_permutation(pending.recv_WCL, sum(counts), layout).split(counts)


# ---- experts in groups -----------------------------------------------------------------------------------
class ExpertGroup(NamedTuple):
    """Weights of neighbouring experts."""

    up: Tensor
    down: Tensor
    weight_grads: tuple[Segment, Segment] | None = None
    """Where the gradients of up and down are written; None for new tensors."""


class _ChunkExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: int) -> tuple[Tensor, ...]:
        ctx.experts = weight.shape[0]
        return weight.chunk(groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return assemble(grads, ctx.experts), None


def chunk_experts(up: Tensor, down: Tensor, groups: int, chunks: int) -> tuple[ExpertGroup, ...]:
    """Stacked weights (E, ...) in G groups of neighbours for C chunks of rows; E is a multiple of G, C too.

    Where each group is of one chunk, the gradients of all are written to one tensor, so that no copy brings them
    together; else those of a group are summed by autograd.
    """
    if groups == 1:
        return (ExpertGroup(up, down),)
    if chunks != groups:
        return tuple(ExpertGroup(u, d) for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True))
    experts = up.shape[0]
    up_grads, down_grads = (SegmentedBuffer([experts // groups] * groups, experts) for _ in range(2))
    pairs = zip(_ChunkExperts.apply(up, groups), _ChunkExperts.apply(down, groups), strict=True)
    return tuple(ExpertGroup(u, d, (Segment(up_grads, i), Segment(down_grads, i))) for i, (u, d) in enumerate(pairs))


# ---- dispatcher ------------------------------------------------------------------------------------------
class AllToAllHandle(NamedTuple):
    """Where the rows go, and what comes."""

    routing_index: RoutingIndex
    """Of the slots, sorted by chunk, rank and expert; in each chunk local ones are last."""
    weights_TK: Tensor
    counts: PendingSplits


class CombineHandle(NamedTuple):
    """What brings the rows of one chunk back."""

    routing_index: RoutingIndex
    weights_TK: Tensor
    splits: Splits
    perm: Tensor
    """int32, of the rows as they were received, then the local ones."""


class AllToAllDispatcher(Dispatcher):
    """Tokens of this rank, experts of all: (T, D) -> rows for this rank's experts -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        may_drop: whether a slot may have no expert.
        group: of ranks that hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: C, at least 1; the same on every rank, whatever its tokens.

    With one chunk nothing overlaps: the computing stream carries every all-to-all. With more, `run` computes each as it
    is received; that pays where the ranks' link is slow.
    """

    def __init__(self, num_experts: int, top_k: int, may_drop: bool, group: dist.ProcessGroup, chunks: int = 1) -> None:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if chunks < 1:
            raise ValueError(f"dispatch: overlap_chunks must be at least 1, got overlap_chunks={chunks}")
        self.num_experts, self.top_k, self.may_drop = num_experts, top_k, may_drop
        self.group, self.ranks, self.chunks = group, world, chunks
        self.layout = EpLayout.of(rank, world, chunks, local_experts(num_experts, world))
        #: Compare the splits of every all-to-all with the other ranks' before it starts: slow, to find a fault.
        self.debug_check_splits = False
        self.comm_hook: CommHook | None = None

    @override
    def index(self, selection: Selection) -> AllToAllHandle:
        """Sort the slots and start to exchange counts; on a GPU the host does not wait."""
        index = build_index(bucket_slots(selection.expert_ids_TK, self.layout), self.layout.buckets)
        counts = self._exchange_counts(send_counts(index.expert_offsets, self.layout))
        return AllToAllHandle(index, selection.weights_TK, counts)

    def _exchange_counts(self, send_WCL: Tensor) -> PendingSplits:
        return exchange_counts(self.group, send_WCL, self.layout, async_op=self.chunks > 1)

    def all_to_all(self, send: Sequence[int], recv: Sequence[int], name: str = "dispatch") -> AllToAll:
        """Of rows to and from each rank."""
        return AllToAll(self.group, send, recv, name, self.comm_hook, async_op=self.chunks > 1)

    def _all_to_alls(self, splits: Splits, device: torch.device) -> list[AllToAll]:
        dispatches = [self.all_to_all(send, recv) for send, recv in zip(splits.send, splits.recv, strict=True)]
        if self.debug_check_splits:
            for dispatch in dispatches:
                check_splits(dispatch, device)
        return dispatches

    def _gather(self, x_TD: Tensor, handle: AllToAllHandle) -> Tensor:
        x_TD = x_TD.to(compute_dtype(x_TD))  # half the bytes to move under autocast
        return permute(x_TD, handle.routing_index, self.top_k, may_drop=self.may_drop)

    @override
    def permute(self, x_TD: Tensor, handle: AllToAllHandle) -> Dispatched:
        """Waits on the host for the counts. For one chunk: of more each is computed as it is received, by `run`."""
        if self.chunks > 1:
            raise ValueError(
                "dispatch: the rows of several chunks are not all there at once, got overlap_chunks="
                f"{self.chunks}; use run, or one chunk"
            )
        rows_ND = self._gather(x_TD, handle)
        splits = wait_splits(handle.counts, self.layout.rank)
        [dispatch] = self._all_to_alls(splits, rows_ND.device)
        sent, local = split(rows_ND, splits.segments)
        pending = dispatch_start(sent, dispatch)
        [perm] = recv_perms(handle.counts, splits, self.layout)
        grads = ReceiveBuffers.allocate(splits.segments, rows_ND.shape[0])
        rows = dispatch_wait(pending, local, perm, dispatch, grads, 0)
        [offsets] = handle.counts.offsets
        return Dispatched(rows, offsets, None, CombineHandle(handle.routing_index, handle.weights_TK, splits, perm))

    @override
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        index, weights_TK, splits, perm = dispatched.handle
        [send], [recv] = splits.send, splits.recv
        back = self.all_to_all(recv, send, "combine")
        slots = index.perm_N.shape[0]
        parts = combine_start(rows, perm, back, ReceiveBuffers.allocate(splits.segments, slots), 0)
        rows_ND = combine_wait(parts, [back], slots)
        return unpermute(rows_ND, weights_TK, index, may_drop=self.may_drop)

    @override
    def run(self, experts: Experts, x_TD: Tensor, selection: Selection, hook: Hook = no_hook) -> Tensor:
        """Of several chunks, each is computed while the next is received and the last is sent back."""
        if self.chunks == 1:
            return super().run(experts, x_TD, selection, hook)
        index, weights_TK, counts = handle = run_step(hook, Phase.INDEX, selection.weights_TK, self.index, selection)
        hook(Phase.PERMUTE)
        rows_ND = self._gather(x_TD, handle)
        splits = wait_splits(counts, self.layout.rank)
        dispatches = self._all_to_alls(splits, rows_ND.device)
        combines = [dispatch.transpose() for dispatch in dispatches]
        buffers = ReceiveBuffers.allocate(splits.segments, rows_ND.shape[0])
        rows = split(rows_ND, splits.segments)
        in_flight = dispatch_start(rows[0], dispatches[0])
        perms = recv_perms(counts, splits, self.layout)
        parts: list[Tensor] = []
        for i, combine in enumerate(combines):
            pending = in_flight
            if i + 1 < self.chunks:
                in_flight = dispatch_start(rows[2 * i + 2], dispatches[i + 1])
            received = dispatch_wait(pending, rows[2 * i + 1], perms[i], dispatches[i], buffers, i)
            if i == 0:
                hook(Phase.EXPERTS, received)
                dtype = compute_dtype(received)
                implementation = experts.implementation_for(dtype, received.device)
                groups = chunk_experts(experts.up.to(dtype), experts.down.to(dtype), self.layout.groups, self.chunks)
            up, down, weight_grads = groups[i % len(groups)]
            done = expert_rows(
                received, up, down, counts.offsets[i], None, experts.activation, implementation,
                weight_grads=weight_grads, sm_margin=NCCL_BLOCKS,
            )  # fmt: skip
            parts += combine_start(done, perms[i], combine, buffers, i)
        hook(Phase.UNPACK, done)
        rows_ND = combine_wait(parts, combines, rows_ND.shape[0])
        return unpermute(rows_ND, weights_TK, index, may_drop=self.may_drop)
