"""Experts spread over the ranks of a host, whose rows are written straight into each other's memory.

Legend: T tokens, K top_k, N = T * K slots, E experts in all, W ranks, L = E / W experts per rank, D d_model, R rows
that a rank has capacity for: W * T * min(K, L), all that can come.

No host waits: how many rows come is known on the device alone, and the experts work on a buffer of R rows, of which
those after the last offset are undefined. A rank's own rows take the same way. Rows carry their combine weights.

Buffers. Rows are saved for backward, so each dispatcher has a pool of buffers and takes another one while an earlier
pass still needs the first. Two scratch buffers are shared by all layers of a group: `combine`, which other ranks read
(the experts' outputs; the gradient of their rows), and `grad`, which they write to (the gradient of the outputs). Why
no rank writes what another still reads, given that at a barrier every rank has done all that was queued before:
- rows: a buffer is released, on every rank, before the next pass takes it; a barrier (of the counts) precedes a put;
- combine: there is a barrier (at the end of a put) between a get and the experts' next work;
- grad: there is a barrier before a put of gradients.
So `index` is for one `permute` and one `combine`, in this order, with no other layer's in between.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moe_lightning.expert_parallel.collectives import CommHook, local_experts, timed_region
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers.dispatch import Dispatched, Dispatcher
from moe_lightning.layers.experts import Experts, compute_dtype, expert_rows
from moe_lightning.layers.phases import Hook, Phase, no_hook, run_step
from moe_lightning.ops import RoutingIndex, RowWeights, Selection, build_index, unpermute
from moe_lightning.ops.library import accum_dtype
from moe_lightning.ops.symmetric import Route, SymmetricTensor, barrier, exchange_counts, get, put
from moe_lightning.utils.errors import ContextLostError

#: Forward passes of one layer whose backward is still to come.
MAX_WAITING_PASSES = 8


#: Passes of one kind share buffers, see `BufferPool`.
Kind = Literal["step", "captured", "eager"]


class _Pass(NamedTuple):
    """A pass that holds a buffer."""

    buffer: int
    kind: Kind
    micro_batch: int
    """That it ends with; 0: it belongs to none."""
    captured: bool


class BufferPool:
    """Numbered buffers, allocated when they are first needed and kept.

    A pass holds one from `acquire` to `release`, and takes the lowest that is free among those of its kind:

    - step: of a training micro-batch, eager or captured in a CUDA graph; while training goes on, without a gradient
      too. None of them lasts longer than its micro-batch, and graphs are replayed one after another, so all may share.
      A buffer has the same number in a replay as in an eager pass: one rank may replay where another cannot. A graph
      that is dropped leaves nothing behind.
    - captured: any other in a graph. Once released, another captured pass may take its buffer, as graphs share
      torch's memory pool, and never an eager one, which may run between any two replays.
    - eager: the rest, which may wait for their backward as long as they like.

    A kind without a free buffer takes one of the eager ones, for good. All ranks must make the same calls.
    """

    def __init__(self, memory: SymmetricMemory) -> None:
        self._memory = memory
        self._buffers = 0
        self._passes = 0
        self._free: dict[Kind, set[int]] = {"step": set(), "captured": set(), "eager": set()}
        self._held: dict[int, _Pass] = {}
        self._tensors: dict[tuple[int, tuple[int, ...], torch.dtype], SymmetricTensor] = {}

    def acquire(self) -> int:
        """The number of a new pass, which holds a buffer.

        Raises:
            ValueError: too many passes hold one.
        """
        for number in [number for number, held in self._held.items() if not self._lasts(held)]:
            self.release(number)
        if len(self._held) >= MAX_WAITING_PASSES:
            raise ValueError(
                f"dispatch: symmetric has buffers for {MAX_WAITING_PASSES} passes of a layer that wait for their "
                f"backward, got one more; run backward first, or the forward pass under torch.no_grad()"
            )
        memory, captured = self._memory, self._memory.is_capturing()
        of_step = memory.in_micro_batch or (memory.micro_batches > 0 and not torch.is_grad_enabled())
        kind: Kind = "step" if of_step else "captured" if captured else "eager"
        if free := self._free[kind] or self._free["eager"]:
            buffer = min(free)
            free.remove(buffer)
        else:
            buffer, self._buffers = self._buffers, self._buffers + 1
        self._passes += 1
        micro_batch = memory.micro_batches if memory.in_micro_batch else 0
        self._held[self._passes] = _Pass(buffer, kind, micro_batch, captured)
        return self._passes

    def _lasts(self, held: _Pass) -> bool:
        """Not where its micro-batch is over, or the capture that it was part of has failed."""
        if not held.micro_batch:
            return True
        return held.micro_batch == self._memory.micro_batches and (self._memory.is_capturing() or not held.captured)

    def release(self, number: int) -> None:
        """The pass needs its buffer no longer."""
        if held := self._held.pop(number, None):
            self._free[held.kind].add(held.buffer)

    def buffer(self, number: int) -> int:
        """The buffer that a pass holds.

        Raises:
            ValueError: it was released, or its micro-batch is over.
        """
        held = self._held.get(number)
        if held is None or not self._lasts(held):
            raise ValueError(
                "dispatch: a pass by dispatch=symmetric has one backward, in training before the next micro-batch, "
                "after which another may use its buffers, got a later one; run the forward pass again"
            )
        return held.buffer

    def tensor(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> SymmetricTensor:
        """A pass's tensor of this shape and dtype; the first time a collective."""
        key = self.buffer(number), shape, dtype
        if key not in self._tensors:
            self._tensors[key] = self._memory.allocate(shape, dtype)
        return self._tensors[key]


class SymmetricHandle(NamedTuple):
    """Where the rows go, and what comes; all of it on the device."""

    routing_index: RoutingIndex
    """Of this rank's slots over all experts."""
    route: Route
    weights_TK: Tensor
    expert_offsets: Tensor
    """int32 (L + 1) of the rows that come."""
    capacity: int
    """R."""
    number: int
    """Of the pass, in the pool."""
    row_weights: RowWeights | None = None
    """Of the rows that came."""


class SymmetricDispatcher(Dispatcher):
    """Tokens of this rank, experts of all, through each other's memory: (T, D) -> (R, D) -> (T, D).

    Args:
        num_experts: E, a multiple of the size of the group.
        top_k: K.
        memory: of the group whose ranks hold the experts between them, in order: rank r holds [r L, (r + 1) L).
        chunks: 1; the rows travel in one kernel.
        max_tokens: the most tokens of a rank in a pass. None: the most that any had in the first pass, and more where
            all ranks have as many, since no rank's host knows what another one has.

    The first pass, and one with more tokens than before, is a collective of the hosts.
    """

    def __init__(
        self, num_experts: int, top_k: int, memory: SymmetricMemory, chunks: int = 1, max_tokens: int | None = None
    ) -> None:
        if chunks != 1:
            raise ValueError(
                f"dispatch: symmetric moves all rows in one kernel, got overlap_chunks={chunks}; set overlap_chunks=1, "
                "or choose another dispatch"
            )
        self.num_experts, self.top_k, self.memory = num_experts, top_k, memory
        self.ranks = memory.world
        self.local_experts = local_experts(num_experts, memory.world)
        self.comm_hook: CommHook | None = None
        self._counts: SymmetricTensor | None = None
        self._pool = BufferPool(memory)
        self._may_grow = max_tokens is None
        self._host_counts = _host_counts(memory.device)
        self._reserve(max_tokens or 0)

    # ---- capacity ----------------------------------------------------------------------------------------
    @property
    def capacity(self) -> int:
        """R, for the most tokens so far: a token's slots have distinct experts."""
        return self.memory.world * self.max_tokens * min(self.top_k, self.local_experts)

    def _agree_on_capacity(self, tokens: int) -> None:
        """A collective. At least a quarter more than before, so that growing comes to an end."""
        if not self._may_grow:
            raise ValueError(
                "dispatch: tokens of a rank must be at most max_tokens, by default the most of the first pass if the "
                f"ranks had unequal numbers in it, got tokens={tokens}, max_tokens={self.max_tokens}; raise max_tokens"
            )
        if self.memory.is_capturing():
            raise RuntimeError(
                "dispatch: ranks must agree on their capacity before a CUDA graph is captured, got "
                f"tokens={tokens}, max_tokens={self.max_tokens}; run the same pass once before"
            )
        least, most = self.memory.all_reduce_min_max(tokens)
        self._may_grow = least == most
        self._reserve(max(1, most, self.max_tokens * 5 // 4))

    def _reserve(self, tokens: int) -> None:
        #: Of a rank in a pass. Captured passes are of this number: where it has grown, they must be captured again.
        self.max_tokens = tokens
        self._every_row = torch.arange(self.capacity, dtype=torch.int32, device=self.memory.device)

    # ---- a pass ------------------------------------------------------------------------------------------
    @override
    def index(self, selection: Selection) -> SymmetricHandle:
        """Sort the slots, exchange counts; the host knows none of them. Takes a buffer until the pass is over."""
        memory = self.memory
        if error := memory.signals.error():
            raise ContextLostError(error)
        ids_TK = selection.expert_ids_TK.contiguous()
        if self._counts is None:
            self._counts = memory.allocate((2, memory.world, self.num_experts + 1), torch.int32)
        if ids_TK.shape[0] > self.max_tokens or self.max_tokens == 0:
            self._agree_on_capacity(ids_TK.shape[0])
        index = build_index(ids_TK, self.num_experts)
        number = self._pool.acquire()
        buffer = self._pool.buffer(number)
        expert_offsets, dst_offset_E = exchange_counts(index, self._counts, memory.signals, self.capacity, buffer)
        route = Route(ids_TK, index.inverse_perm_N, dst_offset_E, self.local_experts)
        return SymmetricHandle(index, route, selection.weights_TK, expert_offsets, self.capacity, number)

    @override
    def permute(self, x_TD: Tensor, handle: SymmetricHandle) -> Dispatched:
        """Write the rows, with their weights, to their experts' ranks."""
        x_TD = x_TD.to(compute_dtype(x_TD))  # half the bytes to move under autocast
        weights_TK = handle.weights_TK.to(accum_dtype(x_TD.dtype))
        rows_RD, weights_R1 = _PutRows.apply(x_TD, weights_TK, self, handle)
        row_weights = RowWeights(weights_R1, self._every_row[: handle.capacity])
        return Dispatched(rows_RD, handle.expert_offsets, row_weights, handle._replace(row_weights=row_weights))

    @override
    def combine(self, rows: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums of a token's K rows, read where their experts are."""
        handle = dispatched.handle
        if dispatched.row_weights is None:
            weights_R1, every_row, _ = handle.row_weights
            in_place = RoutingIndex(handle.expert_offsets, every_row, every_row)
            rows = unpermute(rows, weights_R1, in_place, may_drop=True)
        y_TD = _GetSums.apply(rows, self, handle)
        if not y_TD.requires_grad:
            self.release(dispatched)
        return y_TD

    def release(self, dispatched: Dispatched) -> None:
        """End a pass: needed only for one that is neither combined nor has a backward."""
        self._pool.release(dispatched.handle.number)

    @override
    def run(self, experts: Experts, x_TD: Tensor, selection: Selection, hook: Hook = no_hook) -> Tensor:
        """The experts leave their outputs where `combine` reads them, without a copy."""
        dispatched = self.dispatch(x_TD, selection, hook)
        if not experts.fuses_weights(dispatched.rows):
            dispatched = dispatched._replace(row_weights=None)
        rows = run_step(hook, Phase.EXPERTS, dispatched.rows, self._compute, experts, dispatched)
        return run_step(hook, Phase.UNPACK, rows, self.combine, rows, dispatched)

    def _compute(self, experts: Experts, dispatched: Dispatched) -> Tensor:
        rows, offsets, row_weights, handle = dispatched
        assert offsets is not None
        dtype = compute_dtype(rows)
        implementation = experts.implementation_for(dtype, rows.device)
        up, down, cutlass = experts.factors(implementation, dtype)
        if torch.is_grad_enabled():
            up, down = _ReleaseInBackward.apply(up, down, self._pool, handle.number)
        out = self._combine_buffer(rows).own
        return expert_rows(
            rows, up, down, offsets, row_weights, experts.activation, implementation, out=out, **cutlass
        )  # fmt: skip

    # ---- the two movements -------------------------------------------------------------------------------
    def _put(
        self, name: str, x_TD: Tensor, weights_TK: Tensor | None, handle: SymmetricHandle,
        rows: SymmetricTensor, row_weights: SymmetricTensor | None,
    ) -> None:  # fmt: skip
        with timed_region(self.comm_hook, name, x_TD.is_cuda) as movement:
            put(x_TD, weights_TK, handle.route, rows, row_weights, self.memory.signals)
            if movement is not None:
                count = handle.expert_offsets[-1] - self._local_rows(handle)
                movement.received(count, x_TD[:1].nbytes, self._host_count(name))

    def _get(
        self, name: str, rows_RD: Tensor | None, scalars_R1: Tensor | None, handle: SymmetricHandle, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        rows = None if rows_RD is None else self._readable(rows_RD)
        scalars = None if scalars_R1 is None else self._readable(scalars_R1.flatten())
        device = handle.expert_offsets.device
        with timed_region(self.comm_hook, name, device.type == "cuda") as movement:
            barrier(self.memory.signals)
            y_TD, scalars_TK = get(rows, scalars, handle.route, dtype)
            if movement is not None:
                row_bytes = 0 if rows_RD is None else rows_RD[:1].nbytes
                count = handle.routing_index.expert_offsets[-1] - self._local_rows(handle)
                movement.received(count, row_bytes, self._host_count(name))
        return y_TD, scalars_TK

    def _readable(self, rows: Tensor) -> SymmetricTensor:
        """The rows where other ranks can read them."""
        buffer = self._combine_buffer(rows)
        if rows.data_ptr() != buffer.own.data_ptr():
            buffer.own.copy_(rows)
        return buffer

    def _combine_buffer(self, rows: Tensor) -> SymmetricTensor:
        return self.memory.scratch("combine", tuple(rows.shape), rows.dtype)

    def _host_count(self, name: str) -> Tensor | None:
        return self._host_counts[name] if self.memory.is_capturing() else None

    def _local_rows(self, handle: SymmetricHandle) -> Tensor:
        """How many rows come from this rank itself."""
        offsets, begin = handle.routing_index.expert_offsets, self.memory.rank * self.local_experts
        return offsets[begin + self.local_experts] - offsets[begin]


def _host_counts(device: torch.device) -> dict[str, Tensor]:
    """Where a captured movement leaves its count at each replay: none can be allocated while a graph is captured."""
    names = [f"{way}/{direction}" for way in ("dispatch", "combine") for direction in ("forward", "backward")]
    counts = torch.zeros(len(names), dtype=torch.int32, pin_memory=device.type == "cuda")
    return dict(zip(names, counts.unbind(), strict=True))


# ---- autograd --------------------------------------------------------------------------------------------
class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, dispatcher: SymmetricDispatcher, handle: SymmetricHandle
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.handle, ctx.dtype = dispatcher, handle, x_TD.dtype
        ctx.set_materialize_grads(False)
        tensor = dispatcher._pool.tensor
        rows = tensor(handle.number, (handle.capacity, x_TD.shape[1]), x_TD.dtype)
        row_weights = tensor(handle.number, (handle.capacity,), weights_TK.dtype)
        dispatcher._put("dispatch/forward", x_TD, weights_TK, handle, rows, row_weights)
        return rows.own.view_as(rows.own), row_weights.own[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor | None, grad_weights_R1: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grad_RD, grad_weights_R1
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        grad_TD, grad_TK = ctx.dispatcher._get("dispatch/backward", *wanted, ctx.handle, ctx.dtype)
        ctx.dispatcher._pool.release(ctx.handle.number)
        return grad_TD, grad_TK, None, None


class _GetSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, dispatcher: SymmetricDispatcher, handle: SymmetricHandle) -> Tensor | None:
        ctx.dispatcher, ctx.handle, ctx.shape = dispatcher, handle, rows_RD.shape
        return dispatcher._get("combine/forward", rows_RD, None, handle, rows_RD.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        dispatcher = ctx.dispatcher
        dispatcher._pool.buffer(ctx.handle.number)  # raises where the experts' rows are gone
        grad = dispatcher.memory.scratch("grad", tuple(ctx.shape), grad_TD.dtype)
        barrier(dispatcher.memory.signals)
        dispatcher._put("combine/backward", grad_TD, None, ctx.handle, grad, None)
        return grad.own, None, None


class _ReleaseInBackward(torch.autograd.Function):
    """Weights of the experts, whose gradients are the last to need the rows: backward may be asked for these alone."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, pool: BufferPool, number: int) -> tuple[Tensor, Tensor]:
        ctx.pool, ctx.number = pool, number
        ctx.set_materialize_grads(False)
        return up.view_as(up), down.view_as(down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_up: Tensor | None, grad_down: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.pool.release(ctx.number)
        return grad_up, grad_down, None, None
