"""Experts spread over the ranks of a group: rows travel to their expert's rank and back.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts a rank, C chunks, D d_model.

Slots are sorted into bins: those for other ranks first, by chunk of tokens, rank and expert, then those that stay, by
expert, then the dropped ones. A rank's own rows never travel; its experts work on them while the others do. With C
chunks the experts work on one while the next arrives and the last leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.layers.dispatch import Part
from moe_lightning.layers.exchange import (
    Exchange,
    Transfer,
    Watcher,
    check_agreement,
    check_counts,
    finish,
    start,
)
from moe_lightning.ops import RoutingIndex, Selection, build_index, permute, sum_rows, unpermute


@dataclass(frozen=True)
class ParallelPlan:
    """Where the rows go, and what comes."""

    index: RoutingIndex
    weights_TK: Tensor
    may_drop: bool
    ways: tuple[tuple[Exchange, Exchange], ...]
    """There and back, a pair a chunk."""
    arriving_CWL: Tensor
    """int32: rows that come, by chunk, rank and expert."""
    own_offsets: Tensor
    """int32 (L + 1): the rows that stay."""


@dataclass(frozen=True)
class ArrivedPart(Part):
    """Rows of other ranks; `regroup` brought them from the order of ranks to that of experts, where these differ."""

    way_back: Exchange | None = None
    regroup: RoutingIndex | None = None


class ParallelDispatcher:
    """Tokens of this rank, experts of all: (T, D) -> parts -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        may_drop: whether a slot may have no expert.
        group: of ranks that hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: C, at least 1; the same on every rank, whatever its tokens.

    `blocking` waits for every exchange before anything else is done: the same numbers, nothing hidden.
    """

    carries_weights = False

    def __init__(self, num_experts: int, top_k: int, may_drop: bool, group: dist.ProcessGroup, chunks: int = 1) -> None:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if num_experts % world:
            raise ValueError(
                "dispatch: num_experts must be a multiple of the ranks that share them, got "
                f"num_experts={num_experts}, ranks={world}; choose an ep_size that divides it"
            )
        if chunks < 1:
            raise ValueError(f"dispatch: overlap_chunks must be at least 1, got overlap_chunks={chunks}")
        self.num_experts, self.top_k, self.may_drop = num_experts, top_k, may_drop
        self.group, self.world, self.rank, self.chunks = group, world, rank, chunks
        self.local_experts = num_experts // world
        check_agreement(group, num_experts=num_experts, top_k=top_k, overlap_chunks=chunks)
        self.blocking = False
        #: Hold every exchange's counts against the other ranks' before it starts: to find out what is wrong.
        self.checks_counts = False
        #: The seat of a timer.
        self.watch: Watcher | None = None

    def plan(self, selection: Selection) -> ParallelPlan:
        """Sort the slots and tell the other ranks how many come; reads the counts on the host, once."""
        experts, local = self.num_experts, self.local_experts
        ids_TK = selection.expert_ids_TK
        remote = experts - local
        own_begin = self.rank * local
        # Of experts by rank, without this rank's: those above move down.
        is_own_TK = (ids_TK >= own_begin) & (ids_TK < own_begin + local)
        bins_TK = torch.where(ids_TK < own_begin, ids_TK, ids_TK - local)
        tokens = ids_TK.shape[0]
        if self.chunks > 1:
            chunk_T = torch.arange(tokens, device=ids_TK.device) * self.chunks // max(tokens, 1)
            bins_TK = bins_TK + chunk_T[:, None].int() * remote
        bins_TK = torch.where(is_own_TK, self.chunks * remote + ids_TK - own_begin, bins_TK)
        bins_TK = torch.where(ids_TK < 0, -1, bins_TK).int()
        index = build_index(bins_TK, self.chunks * remote + local)

        counts = index.expert_offsets.diff()
        others = counts[: self.chunks * remote].view(self.chunks, self.world - 1, local).transpose(0, 1)
        nothing = counts.new_zeros(1, self.chunks, local)
        leaving_WCL = torch.cat([others[: self.rank], nothing, others[self.rank :]])
        arriving_WCL, leaving, arriving = self._tell(leaving_WCL)
        there = [Exchange(self.group, *counts, self.transfer) for counts in zip(leaving, arriving, strict=True)]
        if self.checks_counts:
            for exchange in there:
                check_counts(exchange, ids_TK.device)
        ways = tuple((exchange, exchange.reverse()) for exchange in there)
        own_offsets = index.expert_offsets[self.chunks * remote :]
        own_offsets = own_offsets - own_offsets[:1]
        arriving_CWL = arriving_WCL.transpose(0, 1)
        return ParallelPlan(index, selection.weights_TK, self.may_drop, ways, arriving_CWL, own_offsets)

    def transfer(self, name: str) -> Transfer:
        """What carries an exchange."""
        return Transfer(name, self.watch)

    def _tell(self, leaving_WCL: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """What arrives here, and on the host the rows that leave and arrive, by chunk and rank."""
        arriving_WCL = torch.empty_like(leaving_WCL)
        dist.all_to_all_single(arriving_WCL, leaving_WCL, group=self.group)
        leaving, arriving = torch.stack([leaving_WCL, arriving_WCL]).sum(3).transpose(1, 2).tolist()
        return arriving_WCL, leaving, arriving

    def dispatch(self, x_TD: Tensor, plan: ParallelPlan) -> Iterable[Part]:
        """The rows that stay, while the others travel; then a part a chunk."""
        rows_ND = permute(x_TD, plan.index, self.top_k, may_drop=plan.may_drop)
        there = [way for way, _ in plan.ways]
        counts = [sum(way.send) for way in there]
        *leaving, staying = rows_ND.split([*counts, rows_ND.shape[0] - sum(counts)])
        pending = [start(rows, way) for rows, way in zip(leaving, there, strict=True)]
        if self.blocking:
            pending = [finish(rows, way) for rows, way in zip(pending, there, strict=True)]
        yield Part(staying, plan.own_offsets)
        for rows, (way, way_back), counts_WL in zip(pending, plan.ways, plan.arriving_CWL, strict=True):
            arrived = rows if self.blocking else finish(rows, way)
            yield self._arrived(arrived, way_back, counts_WL)

    def _arrived(self, rows_RD: Tensor, way_back: Exchange, counts_WL: Tensor) -> ArrivedPart:
        """Sorted by expert; rows of a single rank are so already."""
        if self.world == 2:
            offsets = torch.cat([counts_WL.new_zeros(1), counts_WL.sum(0).cumsum(0)]).int()
            return ArrivedPart(rows_RD, offsets, way_back=way_back)
        experts_WL = torch.arange(self.local_experts, dtype=torch.int32, device=rows_RD.device).expand_as(counts_WL)
        ids_R = experts_WL.flatten().repeat_interleave(counts_WL.flatten(), output_size=rows_RD.shape[0])
        regroup = build_index(ids_R[:, None], self.local_experts)
        rows_RD = permute(rows_RD, regroup, top_k=1)
        return ArrivedPart(rows_RD, regroup.expert_offsets, way_back=way_back, regroup=regroup)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> Tensor:
        """What stays is here; what came leaves."""
        if not isinstance(part, ArrivedPart) or part.way_back is None:
            return rows
        if part.regroup is not None:
            rows = sum_rows(rows, part.regroup, top_k=1)
        pending = start(rows, part.way_back)
        return finish(pending, part.way_back) if self.blocking else pending

    def combine(self, rows: list[Tensor], plan: ParallelPlan, weighted: bool = False) -> Tensor:
        """Wait for the rows that travelled, then the weighted sum of a token's K rows."""
        own_ND, *pending = rows
        if not self.blocking:
            pending = [finish(p, way_back) for p, (_, way_back) in zip(pending, plan.ways, strict=True)]
        return unpermute(torch.cat([*pending, own_ND]), plan.weights_TK, plan.index, may_drop=plan.may_drop)
