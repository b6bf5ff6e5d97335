"""Experts spread over the ranks of a group: rows travel to their expert's rank and back.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts a rank, C chunks, D d_model.

Slots are sorted into bins: those for other ranks first, by chunk of tokens, rank and expert, then those that stay, by
expert, then the dropped ones. A rank's own rows never travel; its experts work on them while the others do. With C
chunks the experts work on one while the next arrives and the last leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

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
from moe_lightning.layers.traffic import Traffic
from moe_lightning.ops import RoutingIndex, Selection, build_index, permute, sum_rows, unpermute
from moe_lightning.ops.row_counts import Share, bin_slots, count_leaving


@dataclass(frozen=True)
class ParallelPlan:
    """Where the rows go, and what comes."""

    index: RoutingIndex
    weights_TK: Tensor
    may_drop: bool
    traffic: Traffic
    """How many rows go where, as the ranks are being told."""
    own_offsets: Tensor
    """int32 (L + 1): the rows that stay."""
    exchange: Callable[[list[int], list[int]], Exchange]
    """Of so many rows sent to each rank, and received."""

    @cached_property
    def ways(self) -> tuple[tuple[Exchange, Exchange], ...]:
        """There and back, a pair a chunk; waits for the counts."""
        there = [self.exchange(*counts) for counts in zip(*self.traffic.read(), strict=True)]
        return tuple((exchange, exchange.reverse()) for exchange in there)


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
        self.group, self.world, self.chunks = group, world, chunks
        self.local_experts = num_experts // world
        self.share = Share(rank, world, chunks, self.local_experts)
        check_agreement(group, num_experts=num_experts, top_k=top_k, overlap_chunks=chunks)
        self.blocking = False
        #: Hold every exchange's counts against the other ranks' before it starts: to find out what is wrong.
        self.checks_counts = False
        #: The seat of a timer.
        self.watch: Watcher | None = None

    def plan(self, selection: Selection) -> ParallelPlan:
        """Sort the slots and begin to tell the other ranks how many come; waits for nothing."""
        index = build_index(bin_slots(selection.expert_ids_TK, self.share), self.share.bins)
        leaving_WCL, own_offsets = count_leaving(index.expert_offsets, self.share)
        traffic = self._tell(leaving_WCL)
        exchange = partial(self._exchange, own_offsets.device)
        return ParallelPlan(index, selection.weights_TK, self.may_drop, traffic, own_offsets, exchange)

    def _exchange(self, device: torch.device, send: list[int], receive: list[int]) -> Exchange:
        exchange = Exchange(self.group, send, receive, self.transfer)
        if self.checks_counts:
            check_counts(exchange, device)
        return exchange

    def transfer(self, name: str) -> Transfer:
        """What carries an exchange."""
        return Transfer(name, self.watch)

    def _tell(self, leaving_WCL: Tensor) -> Traffic:
        return Traffic(self.group, leaving_WCL, self.share)

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
        for i, (rows, (way, way_back)) in enumerate(zip(pending, plan.ways, strict=True)):
            arrived = rows if self.blocking else finish(rows, way)
            yield self._arrived(arrived, way_back, plan.traffic, i)

    def _arrived(self, rows_RD: Tensor, way_back: Exchange, traffic: Traffic, chunk: int) -> ArrivedPart:
        """Sorted by expert; rows of a single rank are so already."""
        if self.world == 2:
            return ArrivedPart(rows_RD, traffic.offsets[chunk], way_back=way_back)
        counts_WL = traffic.arriving_WCL[:, chunk]
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
