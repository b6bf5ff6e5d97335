"""Experts spread over the ranks of a group: rows travel to their expert's rank and back.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts a rank, C chunks, D d_model.

A chunk is a group of each rank's experts, and where these are too few to be cut in C, a part of the tokens besides
(`ops.row_counts`). The experts work on one chunk while the next arrives and the last leaves. A rank's own rows never
travel: they join those that come for the same experts, so that each weight is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.expert_parallel.crossing import Home, arrive, come_home, cut, depart, turn_back
from moe_lightning.expert_parallel.exchange import Exchange, Transfer, Watcher, check_agreement, check_counts
from moe_lightning.expert_parallel.traffic import Traffic
from moe_lightning.layers.dispatch import Part
from moe_lightning.ops import RoutingIndex, Selection, build_index, permute, unpermute
from moe_lightning.ops.row_counts import Share, bin_slots, count_leaving


@dataclass(frozen=True)
class ParallelPlan:
    """Where the rows go, and what comes."""

    index: RoutingIndex
    """Of the slots, sorted by chunk, rank and expert; in each chunk those that stay are last."""
    weights_TK: Tensor
    may_drop: bool
    rank: int
    traffic: Traffic
    """How many rows go where, as the ranks are being told."""
    exchange: Callable[[list[int], list[int]], Exchange]
    """Of so many rows sent to each rank, and received."""

    @cached_property
    def segments(self) -> list[int]:
        """Rows of each chunk that travel, and that do not; waits for the counts."""
        leaving = self.traffic.read()[0]
        return [count for chunk in leaving for count in (sum(chunk) - chunk[self.rank], chunk[self.rank])]

    @cached_property
    def ways(self) -> tuple[tuple[Exchange, Exchange], ...]:
        """There and back, a pair a chunk; waits for the counts."""
        counts = [[self._others(chunk) for chunk in chunks] for chunks in self.traffic.read()]
        there = [self.exchange(send, receive) for send, receive in zip(*counts, strict=True)]
        return tuple((exchange, exchange.reverse()) for exchange in there)

    def _others(self, counts: list[int]) -> list[int]:
        return [0 if rank == self.rank else count for rank, count in enumerate(counts)]


@dataclass(frozen=True, kw_only=True)
class ArrivedPart(Part):
    """Rows that came and those that stayed."""

    way_back: Exchange
    places: Tensor
    """Of the rows as they came, then those that stayed."""
    chunk: int
    home: Home


class ParallelDispatcher:
    """Tokens of this rank, experts of all: (T, D) -> parts -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        may_drop: whether a slot may have no expert.
        group: of ranks that hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: C, at least 1; the same on every rank, whatever its tokens.

    With one chunk nothing is hidden: the computing stream carries every exchange.
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
        self.group, self.ranks, self.chunks = group, world, chunks
        self.share = Share.of(rank, world, chunks, num_experts // world)
        self.expert_groups, self.parts = self.share.groups, chunks
        check_agreement(group, num_experts=num_experts, top_k=top_k, overlap_chunks=chunks)
        #: Hold every exchange's counts against the other ranks' before it starts: to find out what is wrong.
        self.checks_counts = False
        #: The seat of a timer.
        self.watch: Watcher | None = None

    def plan(self, selection: Selection) -> ParallelPlan:
        """Sort the slots and tell the other ranks how many come; on a GPU the host waits for nothing."""
        index = build_index(bin_slots(selection.expert_ids_TK, self.share), self.share.bins)
        traffic = self._tell(count_leaving(index.expert_offsets, self.share))
        exchange = partial(self._exchange, index.perm_N.device)
        weights_TK, rank = selection.weights_TK, self.share.rank
        return ParallelPlan(index, weights_TK, self.may_drop, rank, traffic, exchange)

    def _exchange(self, device: torch.device, send: list[int], receive: list[int]) -> Exchange:
        exchange = Exchange(self.group, send, receive, self.transfer)
        if self.checks_counts:
            check_counts(exchange, device)
        return exchange

    def transfer(self, name: str) -> Transfer:
        """What carries an exchange."""
        return Transfer(name, self.watch, beside=self.chunks > 1)

    def _tell(self, leaving_WCL: Tensor) -> Traffic:
        return Traffic(self.group, leaving_WCL, self.share, beside=self.chunks > 1)

    def dispatch(self, x_TD: Tensor, plan: ParallelPlan) -> Iterable[Part]:
        """A part a chunk, while the next one travels."""
        rows_ND = permute(x_TD, plan.index, self.top_k, may_drop=plan.may_drop)
        rows = cut(rows_ND, plan.segments)
        home = Home(plan.segments, rows_ND.shape[0])
        travelling = depart(rows[0], plan.ways[0][0])
        for i, (way, way_back) in enumerate(plan.ways):
            pending, staying, places = travelling, rows[2 * i + 1], plan.traffic.places[i]
            if i + 1 < self.chunks:
                travelling = depart(rows[2 * i + 2], plan.ways[i + 1][0])
            joined, offsets = arrive(pending, staying, places, way, home, i), plan.traffic.offsets[i]
            group = i % self.expert_groups
            yield ArrivedPart(joined, offsets, group=group, way_back=way_back, places=places, chunk=i, home=home)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """What came leaves; what stayed is here."""
        assert isinstance(part, ArrivedPart)
        return turn_back(rows, part.places, part.way_back, part.home, part.chunk)

    def combine(self, rows: list[Tensor], plan: ParallelPlan, weighted: bool = False) -> Tensor:
        """Wait for the rows that travelled, then the weighted sum of a token's K rows."""
        rows_ND = come_home(rows, [way_back for _, way_back in plan.ways], plan.index.perm_N.shape[0])
        return unpermute(rows_ND, plan.weights_TK, plan.index, may_drop=plan.may_drop)
