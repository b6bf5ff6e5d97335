"""Experts spread over the ranks of a group: rows travel to their expert's rank and back.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts a rank, C chunks, D d_model.

A chunk is a group of each rank's experts, and where these are too few to be cut in C, a part of the tokens besides
(`ops.row_counts`). The experts work on one chunk while the next arrives and the last leaves, so that each weight is
read once. A rank's own rows never travel: they join those that come for the same experts. With one chunk there would
be nothing to do meanwhile, so then the experts work on the rows that stay while the others travel, at the price of
reading each weight twice.
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
from moe_lightning.ops import RoutingIndex, Selection, build_index, permute, unpermute
from moe_lightning.ops.join import disjoin, join
from moe_lightning.ops.row_counts import Share, bin_slots, count_leaving


@dataclass(frozen=True)
class ParallelPlan:
    """Where the rows go, and what comes."""

    index: RoutingIndex
    """Of the slots, sorted by chunk, rank and expert; in each chunk those that stay are last."""
    weights_TK: Tensor
    may_drop: bool
    apart: bool
    """Whether the rows that stay are a part of their own."""
    rank: int
    traffic: Traffic
    """How many rows go where, as the ranks are being told."""
    exchange: Callable[[list[int], list[int]], Exchange]
    """Of so many rows sent to each rank, and received."""

    @cached_property
    def staying(self) -> tuple[int, ...]:
        """Rows of each chunk that do not travel; waits for the counts."""
        return tuple(chunk[self.rank] for chunk in self.traffic.read()[0])

    @cached_property
    def ways(self) -> tuple[tuple[Exchange, Exchange], ...]:
        """There and back, a pair a chunk; waits for the counts."""
        counts = [[self._others(chunk) for chunk in chunks] for chunks in self.traffic.read()]
        there = [self.exchange(send, receive) for send, receive in zip(*counts, strict=True)]
        return tuple((exchange, exchange.reverse()) for exchange in there)

    def _others(self, counts: list[int]) -> list[int]:
        return [0 if rank == self.rank else count for rank, count in enumerate(counts)]


@dataclass(frozen=True)
class ArrivedPart(Part):
    """Rows that came, and those that stayed, where these are no part of their own."""

    way_back: Exchange | None = None
    places: Tensor | None = None
    """Of the rows as they came, then those that stayed; None where they stand by expert as they came."""


class ParallelDispatcher:
    """Tokens of this rank, experts of all: (T, D) -> parts -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        may_drop: whether a slot may have no expert.
        group: of ranks that hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: C, at least 1; the same on every rank, whatever its tokens.

    `blocking` waits for every exchange before anything else is done: nothing is hidden, and each weight is read once.
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
        self.share = Share.of(rank, world, chunks, num_experts // world)
        self.expert_groups = self.share.groups
        check_agreement(group, num_experts=num_experts, top_k=top_k, overlap_chunks=chunks)
        self.blocking = False
        #: Hold every exchange's counts against the other ranks' before it starts: to find out what is wrong.
        self.checks_counts = False
        #: The seat of a timer.
        self.watch: Watcher | None = None

    def plan(self, selection: Selection) -> ParallelPlan:
        """Sort the slots and begin to tell the other ranks how many come; waits for nothing."""
        index = build_index(bin_slots(selection.expert_ids_TK, self.share), self.share.bins)
        apart = self.chunks == 1 and not self.blocking
        traffic = self._tell(count_leaving(index.expert_offsets, self.share), apart)
        exchange = partial(self._exchange, index.perm_N.device)
        weights_TK, rank = selection.weights_TK, self.share.rank
        return ParallelPlan(index, weights_TK, self.may_drop, apart, rank, traffic, exchange)

    def _exchange(self, device: torch.device, send: list[int], receive: list[int]) -> Exchange:
        exchange = Exchange(self.group, send, receive, self.transfer)
        if self.checks_counts:
            check_counts(exchange, device)
        return exchange

    def transfer(self, name: str) -> Transfer:
        """What carries an exchange."""
        return Transfer(name, self.watch)

    def _tell(self, leaving_WCL: Tensor, apart: bool) -> Traffic:
        return Traffic(self.group, leaving_WCL, self.share, apart)

    def dispatch(self, x_TD: Tensor, plan: ParallelPlan) -> Iterable[Part]:
        """A part a chunk, the next ones on their way; or the rows that stay, while the others travel, then these."""
        rows_ND = permute(x_TD, plan.index, self.top_k, may_drop=plan.may_drop)
        counts = [n for (way, _), stay in zip(plan.ways, plan.staying, strict=True) for n in (sum(way.send), stay)]
        *rows, _dropped = rows_ND.split([*counts, rows_ND.shape[0] - sum(counts)])
        staying = rows[1::2]
        pending = [start(leaving, way) for leaving, (way, _) in zip(rows[::2], plan.ways, strict=True)]
        if self.blocking:
            pending = [finish(arriving, way) for arriving, (way, _) in zip(pending, plan.ways, strict=True)]
        if plan.apart:
            yield Part(staying[0], plan.traffic.offsets[0])
        for chunk, (way, way_back) in enumerate(plan.ways):
            arrived = pending[chunk] if self.blocking else finish(pending[chunk], way)
            yield self._arrived(arrived, staying[chunk], way_back, plan, chunk)

    def _arrived(self, arrived_RD: Tensor, own_OD: Tensor, way_back: Exchange, plan: ParallelPlan, i: int) -> Part:
        """Sorted by expert; rows of a single rank are so already."""
        offsets = plan.traffic.offsets[i + plan.apart]
        if plan.apart and self.world == 2:
            return ArrivedPart(arrived_RD, offsets, way_back=way_back)
        places = plan.traffic.places[i]
        rows = join(arrived_RD, own_OD[:0] if plan.apart else own_OD, places)
        return ArrivedPart(rows, offsets, group=i % self.expert_groups, way_back=way_back, places=places)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """What came leaves; what stayed is here."""
        if not isinstance(part, ArrivedPart) or part.way_back is None:
            return (rows,)
        way_back, own_OD = part.way_back, rows[:0]
        if part.places is not None:
            rows, own_OD = disjoin(rows, part.places, sum(way_back.send))
        pending = start(rows, way_back)
        return finish(pending, way_back) if self.blocking else pending, own_OD

    def combine(self, rows: list[Tensor], plan: ParallelPlan, weighted: bool = False) -> Tensor:
        """Wait for the rows that travelled, then the weighted sum of a token's K rows."""
        if plan.apart:
            own_OD, pending, _none = rows
            rows = [pending, own_OD]
        if not self.blocking:
            back = [way_back for _, way_back in plan.ways]
            rows[::2] = [finish(pending, way) for pending, way in zip(rows[::2], back, strict=True)]
        dropped = plan.index.perm_N.shape[0] - sum(sent.shape[0] for sent in rows)
        if dropped:
            rows = [*rows, rows[0].new_empty(dropped, rows[0].shape[1])]
        return unpermute(torch.cat(rows), plan.weights_TK, plan.index, may_drop=plan.may_drop)
