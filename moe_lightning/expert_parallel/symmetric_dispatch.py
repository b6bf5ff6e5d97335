"""Experts spread over the ranks of a host, whose rows are written straight into each other's memory.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts a rank, D d_model, R rows that
a rank has room for: W * T * min(K, L), all that can come.

No host waits: how many rows come is known on the device alone, and the experts work on a buffer of R rows, of which
those behind the last offset are undefined. A rank's own rows take the same way, so there is one part. Its rows carry
their combine weights.

Buffers. Rows are kept for the backward pass, so each dispatcher has buffers of its own and takes another one while an
earlier pass still needs the first: a `Lease`. Two more are used in passing by all layers of a group: `pulled`, which
other ranks read (what the experts made; the gradient of their rows), and `pushed`, which they write to (the gradient of
what the experts made). Why nobody writes what another rank still reads, given that in a meeting every rank has done all
it was asked for before:
- rows: a lease ends, on every rank, before the next one's plan, and the ranks meet (`tell`) before they push;
- pulled: the ranks meet (at the end of a push) between a pull and the experts' next work;
- pushed: the ranks meet before a push of gradients.
So a plan is for one dispatch and one combine, in this order, with no other layer's in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.expert_parallel.exchange import Watcher, check_agreement
from moe_lightning.expert_parallel.movement import watched
from moe_lightning.expert_parallel.symmetric_buffers import Buffers, Lease
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers.dispatch import Part
from moe_lightning.ops import RoutingIndex, RowWeights, Selection, build_index, unpermute
from moe_lightning.ops.dtypes import sum_dtype
from moe_lightning.ops.symmetric import Route, SymmetricTensor, meet, pull, push, tell
from moe_lightning.utils.errors import ContextLostError


@dataclass(frozen=True)
class SymmetricPlan:
    """Where the rows go, and what comes; all of it on the device."""

    index: RoutingIndex
    """Of this rank's slots over all experts."""
    route: Route
    weights_TK: Tensor
    expert_offsets: Tensor
    """int32 (L + 1) of the rows that come."""
    capacity: int
    """R."""
    lease: Lease


class SymmetricDispatcher:
    """Tokens of this rank, experts of all, through each other's memory: (T, D) -> one part (R, D) -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        memory: of the group whose ranks hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: 1; the rows travel in one kernel.
        max_tokens: the most tokens of a rank in a pass. None: the most that any had in the first pass, and more where
            all ranks have as many, since no rank's host knows what another one has.
    """

    carries_weights = True
    expert_groups = parts = 1

    def __init__(
        self, num_experts: int, top_k: int, memory: SymmetricMemory, chunks: int = 1, max_tokens: int | None = None
    ) -> None:
        if num_experts % memory.world:
            raise ValueError(
                "dispatch: num_experts must be a multiple of the ranks that share them, got "
                f"num_experts={num_experts}, ranks={memory.world}; choose an ep_size that divides it"
            )
        if chunks != 1:
            raise ValueError(
                f"dispatch: symmetric moves all rows in one kernel, got overlap_chunks={chunks}; set overlap_chunks=1, "
                "or choose another dispatch"
            )
        check_agreement(memory.group, num_experts=num_experts, top_k=top_k, max_tokens=max_tokens or 0)
        self.num_experts, self.top_k, self.memory = num_experts, top_k, memory
        self.ranks = memory.world
        self.local_experts = num_experts // memory.world
        #: The seat of a timer.
        self.watch: Watcher | None = None
        self._board = memory.allocate((2, memory.world, num_experts + 1), torch.int32)
        self._buffers = Buffers(memory)
        self._may_grow = max_tokens is None
        self._make_room(max_tokens or 0)

    @property
    def capacity(self) -> int:
        """R, for the most tokens so far: a token's slots have distinct experts."""
        return self.memory.world * self._tokens * min(self.top_k, self.local_experts)

    def plan(self, selection: Selection) -> SymmetricPlan:
        """Sort the slots, exchange counts; the host knows none of them."""
        memory = self.memory
        if fault := memory.signals.fault():
            raise ContextLostError(fault)
        ids_TK = selection.expert_ids_TK.contiguous()
        if ids_TK.shape[0] > self._tokens or self._tokens == 0:
            self._agree_on_room(ids_TK.shape[0])
        index = build_index(ids_TK, self.num_experts)
        lease = self._buffers.lease()
        expert_offsets, shift_E = tell(index, self._board, memory.signals, self.capacity, lease.number)
        route = Route(ids_TK, index.inverse_perm_N, shift_E, self.local_experts)
        return SymmetricPlan(index, route, selection.weights_TK, expert_offsets, self.capacity, lease)

    def _agree_on_room(self, tokens: int) -> None:
        """A collective, with a quarter more than before at least, so that there is an end to it."""
        if not self._may_grow:
            raise ValueError(
                "dispatch: tokens of a rank must be at most max_tokens, by default the most of the first pass if the "
                f"ranks had unequal numbers in it, got tokens={tokens}, max_tokens={self._tokens}; raise max_tokens"
            )
        least, most = self.memory.extremes(tokens)
        self._may_grow = least == most
        self._make_room(max(1, most, self._tokens * 5 // 4))

    def _make_room(self, tokens: int) -> None:
        self._tokens = tokens
        self._every_row = torch.arange(self.capacity, dtype=torch.int32, device=self.memory.device)

    def dispatch(self, x_TD: Tensor, plan: SymmetricPlan) -> Iterable[Part]:
        """Write the rows, with their weights, to their experts' ranks; all that come, in one part."""
        weights_TK = plan.weights_TK.to(sum_dtype(x_TD.dtype))
        rows_RD, weights_R1 = _Push.apply(x_TD, weights_TK, self, plan)
        row_weights = RowWeights(weights_R1, self._every_row[: plan.capacity])
        return (Part(rows_RD, plan.expert_offsets, row_weights, self._buffer_for(rows_RD).own),)

    def send_back(self, rows: Tensor, part: Part, weighted: bool = False) -> tuple[Tensor, ...]:
        """They are fetched by `combine`; here they get their weights."""
        if weighted:
            return (rows,)
        assert part.expert_offsets is not None
        assert part.row_weights is not None
        weights_R1, every_row = part.row_weights
        in_place = RoutingIndex(part.expert_offsets, every_row, every_row)
        return (unpermute(rows, weights_R1, in_place, may_drop=True),)

    def combine(self, rows: list[Tensor], plan: SymmetricPlan, weighted: bool = False) -> Tensor:
        """Sums of a token's K rows, read where their experts are."""
        [rows_RD] = rows
        return _Pull.apply(rows_RD, self, plan)

    # ---- the two movements -------------------------------------------------------------------------------
    def _push(
        self, name: str, x_TD: Tensor, weights_TK: Tensor | None, plan: SymmetricPlan,
        rows: SymmetricTensor, row_weights: SymmetricTensor | None,
    ) -> None:  # fmt: skip
        with watched(self.watch, name, x_TD.is_cuda) as movement:
            push(x_TD, weights_TK, plan.route, rows, row_weights, self.memory.signals)
            if movement is not None:
                movement.received(plan.expert_offsets[-1] - self._home(plan), x_TD[:1].nbytes)

    def _pull(
        self, name: str, rows_RD: Tensor | None, scalars_R1: Tensor | None, plan: SymmetricPlan, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        rows = None if rows_RD is None else self._pulled(rows_RD)
        scalars = None if scalars_R1 is None else self._pulled(scalars_R1.flatten())
        device = plan.expert_offsets.device
        with watched(self.watch, name, device.type == "cuda") as movement:
            meet(self.memory.signals)
            y_TD, scalars_TK = pull(rows, scalars, plan.route, dtype)
            if movement is not None:
                width = 0 if rows_RD is None else rows_RD[:1].nbytes
                movement.received(plan.index.expert_offsets[-1] - self._home(plan), width)
        return y_TD, scalars_TK

    def _pulled(self, rows: Tensor) -> SymmetricTensor:
        """The rows where other ranks can read them."""
        pulled = self._buffer_for(rows)
        if rows.data_ptr() != pulled.own.data_ptr():
            pulled.own.copy_(rows)
        return pulled

    def _buffer_for(self, rows: Tensor) -> SymmetricTensor:
        return self.memory.in_passing("pulled", tuple(rows.shape), rows.dtype)

    def _home(self, plan: SymmetricPlan) -> Tensor:
        """How many rows come from this rank itself."""
        offsets, begin = plan.index.expert_offsets, self.memory.rank * self.local_experts
        return offsets[begin + self.local_experts] - offsets[begin]


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, dispatcher: SymmetricDispatcher, plan: SymmetricPlan
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.plan, ctx.dtype = dispatcher, plan, x_TD.dtype
        ctx.set_materialize_grads(False)
        tensor = dispatcher._buffers.tensor
        rows = tensor(plan.lease, (plan.capacity, x_TD.shape[1]), x_TD.dtype)
        row_weights = tensor(plan.lease, (plan.capacity,), weights_TK.dtype)
        dispatcher._push("dispatch/forward", x_TD, weights_TK, plan, rows, row_weights)
        return rows.own.view_as(rows.own), row_weights.own[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor | None, grad_weights_R1: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grad_RD, grad_weights_R1
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return *ctx.dispatcher._pull("dispatch/backward", *wanted, ctx.plan, ctx.dtype), None, None


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: SymmetricDispatcher, plan: SymmetricPlan) -> Tensor | None:
        # The plan holds the lease: the experts may need their rows where these need no gradient themselves.
        ctx.dispatcher, ctx.plan = dispatcher, plan
        ctx.shape = rows_RD.shape
        return dispatcher._pull("combine/forward", rows_RD, None, plan, rows_RD.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        dispatcher = ctx.dispatcher
        pushed = dispatcher.memory.in_passing("pushed", tuple(ctx.shape), grad_TD.dtype)
        meet(dispatcher.memory.signals)
        dispatcher._push("combine/backward", grad_TD, None, ctx.plan, pushed, None)
        return pushed.own, None, None
