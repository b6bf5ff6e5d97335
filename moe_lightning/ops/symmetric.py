"""Rows between the ranks of a host, straight into and out of each other's memory; no rank's host waits.

Legend: W ranks, E experts, L = E / W of a rank, T tokens, K top_k, N = T * K slots, D width, R rows of a rank's buffer.

Two movements, each the other's gradient: `put` writes a token's row to the rank of each of its experts, `get` sums
the rows that lie there. Before them `exchange_counts` tells every rank, on its device, where its rows go.

These are no ops of the torch library: they change memory of other ranks, of which a compiler knows nothing. All ranks
must make the same calls in the same order, on one stream each.
"""

from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.ops import native
from moe_lightning.ops.index import RoutingIndex
from moe_lightning.ops.library import accum_dtype
from moe_lightning.utils.errors import annotate_error

MAX_RANKS = 64
FLAG_WORDS = 32
"""int32 from one rank's flag to the next, as in ``kernels/include/symmetric.h``."""

ERRORS = {
    1: "dispatch: rank {other} of the group did not come within timeout_seconds={seconds:g}; look at that rank's log",
    2: "dispatch: ranks must use their buffers in the same order, rank {other} of the group uses another than rank "
    "{rank}; keep the outputs of as many passes alive on every rank",
    3: "dispatch: more rows are sent to rank {other} of the group than its buffer holds; give a token's slots distinct "
    "experts",
}
"""By their code in ``kernels/include/symmetric.h``."""


class SymmetricTensor(NamedTuple):
    """A tensor of the same shape on every rank, which all can read and write."""

    own: Tensor
    """This rank's."""
    peer_pointers_W: Tensor
    """int64, on the device: the address of each rank's."""
    all_ranks: tuple[Tensor, ...] = ()
    """Each rank's; on the CPU alone."""


class Route(NamedTuple):
    """Slot n of expert e goes to rank e // L, row ``dst_offset_E[e] + inverse_perm_N[n]``; others are dropped."""

    expert_ids_TK: Tensor
    inverse_perm_N: Tensor
    dst_offset_E: Tensor
    local_experts: int


class Steps(IntFlag):
    """Of a barrier. One process that plays several ranks takes them apart: all signal, then each waits."""

    SIGNAL = 1
    WAIT = 2
    BOTH = 3


class Signals:
    """How ranks wait for each other: every barrier has a number, its epoch, kept on the device.

    Args:
        rank: of W = `world` ranks.
        flags: int32 (W, FLAG_WORDS), zero.
        state: int32 (2), zero: the epoch of the last barrier, and a counter of the kernels.
        timeout_seconds: how long a kernel waits for a rank.
        group: of the ranks, by which they wait on the CPU; None: one process plays all of them.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        flags: SymmetricTensor,
        state: Tensor,
        timeout_seconds: float,
        group: dist.ProcessGroup | None,
    ) -> None:
        if not 1 <= world <= MAX_RANKS:
            raise ValueError(f"ops.symmetric: ranks must be in [1, {MAX_RANKS}], got {world}; lower ep_size")
        self.rank, self.world, self._group = rank, world, group
        self._flags, self.state = flags, state
        self._error = torch.zeros(2, dtype=torch.int32, pin_memory=True) if state.is_cuda else None
        self.native: dict[str, int] | None = None
        self.set_timeout(timeout_seconds)

    def set_timeout(self, seconds: float) -> None:
        """Of the kernels that are launched from now on."""
        self.timeout_seconds = seconds
        if self._error is not None:
            self.native = {
                "flags": self._flags.peer_pointers_W.data_ptr(), "state": self.state.data_ptr(),
                "error": self._error.data_ptr(), "timeout_ns": int(1e9 * seconds), "rank": self.rank,
                "ranks": self.world,
            }  # fmt: skip

    def wait_on_host(self) -> None:
        """The CPU's barrier; on a GPU a kernel waits, and `error` says which rank did not come."""
        if self._group is not None:
            with annotate_error("a barrier of dispatch=symmetric"):
                dist.barrier(group=self._group)

    def error(self) -> str | None:
        """Why a kernel ended this process's CUDA context; None if none did. Does not wait."""
        kind, detail = (0, 0) if self._error is None else self._error.tolist()
        if kind == 0:
            return None
        return ERRORS[kind].format(other=detail, rank=self.rank, seconds=self.timeout_seconds)


# ---- torch reference, and the CPU's implementation -------------------------------------------------------
def _layout(counts_WE: Tensor, own_offsets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """From the rows each rank has for each expert: int32 offsets (L + 1) of the rows that come here, and dst_offset_E.

    A slot of expert e lies at row ``dst_offset_E[e] + inverse_perm_N[slot]`` of the expert's rank.
    """
    world, experts = counts_WE.shape
    totals_WL = counts_WE.sum(0).view(world, experts // world)
    begins_WL = totals_WL.cumsum(1) - totals_WL
    dst_offset_E = begins_WL.flatten() + counts_WE[:rank].sum(0) - own_offsets[:-1]
    expert_offsets = torch.cat([begins_WL[rank], totals_WL[rank].sum()[None]])
    return expert_offsets.int(), dst_offset_E.int()


def _destinations(
    expert_ids_TK: Tensor, inverse_perm_N: Tensor, dst_offset_E: Tensor, local_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots that are not dropped, the rank that each goes to, and its row there."""
    ids_N = expert_ids_TK.reshape(-1).long()
    slots = ((ids_N >= 0) & (ids_N < dst_offset_E.shape[0])).nonzero().flatten()
    ids = ids_N[slots]
    return slots, ids // local_experts, dst_offset_E[ids].long() + inverse_perm_N[slots]


def _put_reference(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    route: tuple[Tensor, Tensor, Tensor, int],
    rows_W: Sequence[Tensor],
    row_weights_W: Sequence[Tensor] | None,
) -> None:
    """Write each slot's row, and its weight, where it goes."""
    slots, ranks, rows = _destinations(*route)
    top_k = route[0].shape[1]
    for rank, rows_RD in enumerate(rows_W):
        here = ranks == rank
        rows_RD[rows[here]] = x_TD[slots[here] // top_k]
        if weights_TK is not None and row_weights_W is not None:
            row_weights_W[rank][rows[here]] = weights_TK.reshape(-1)[slots[here]]


def _get_reference(rows_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """Sums of each token's rows (T, D)."""
    slots_ND = _gather(rows_W, route)
    top_k, wide = route[0].shape[1], accum_dtype(slots_ND.dtype)
    return slots_ND.view(-1, top_k, slots_ND.shape[1]).sum(1, dtype=wide).to(slots_ND.dtype)


def _get_scalars_reference(row_scalars_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """The scalar of each slot's row (T, K); 0 where it was dropped."""
    return _gather(row_scalars_W, route).view(route[0].shape)


def _gather(rows_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    slots, ranks, rows = _destinations(*route)
    gathered = rows_W[0].new_zeros(route[0].numel(), *rows_W[0].shape[1:])
    for rank, theirs in enumerate(rows_W):
        here = ranks == rank
        gathered[slots[here]] = theirs[rows[here]]
    return gathered


# ---- barriers --------------------------------------------------------------------------------------------
def barrier(signals: Signals, steps: Steps = Steps.BOTH) -> None:
    """What each rank has written before, every rank may read after."""
    if signals.native is not None:
        native.module("cuda").barrier(native.place(signals.state), signals.native, steps=int(steps))
        return
    if steps & Steps.SIGNAL:
        signals.state[0] += 1
    if steps & Steps.WAIT:
        signals.wait_on_host()


def exchange_counts(
    index: RoutingIndex,
    counts: SymmetricTensor,
    signals: Signals,
    capacity: int,
    buffer: int = 0,
    steps: Steps = Steps.BOTH,
) -> tuple[Tensor, Tensor]:
    """Exchange counts: int32 offsets (L + 1) of the rows that will come here, and dst_offset_E of a `Route`.

    Args:
        index: of this rank's slots over all E experts.
        counts: int32 (2, W, E + 1); of one caller.
        signals: of the ranks.
        capacity: R.
        buffer: number of the buffer that rows will be put into; the ranks must mean the same one.
        steps: both, except in tests.

    Raises:
        ValueError: a rank's rows do not fit, or the buffers differ; on a GPU `Signals.error` says it.
    """
    offsets = index.expert_offsets
    experts = offsets.shape[0] - 1
    if signals.native is not None:
        expert_offsets, dst_offset_E = offsets.new_empty(experts // signals.world + 1), offsets.new_empty(experts)
        native.module("cuda").exchange_counts(
            native.place(offsets), signals.native, steps=int(steps), own_offsets=offsets.data_ptr(),
            counts=counts.peer_pointers_W.data_ptr(), expert_offsets=expert_offsets.data_ptr(),
            dst_offset=dst_offset_E.data_ptr(), capacity=capacity, buffer=buffer, experts=experts,
        )  # fmt: skip
        return expert_offsets, dst_offset_E
    epoch = int(signals.state[0]) + (1 if steps & Steps.SIGNAL else 0)
    if steps & Steps.SIGNAL:
        sent = torch.cat([offsets.diff(), offsets.new_tensor([buffer])])
        for theirs in counts.all_ranks:
            theirs[epoch % 2, signals.rank] = sent
    barrier(signals, steps)
    received_WE = counts.own[epoch % 2]
    counts_WE, buffers = received_WE[:, :-1], received_WE[:, -1].tolist()
    if steps & Steps.WAIT:
        rows = counts_WE.sum(0).view(signals.world, -1).sum(1).tolist()
        if max(rows) > capacity or len(set(buffers)) > 1:
            raise ValueError(
                f"ops.exchange_counts: rows must fit and buffers agree, got rows={rows}, capacity={capacity}, "
                f"buffers={buffers}"
            )
    return _layout(counts_WE, offsets, signals.rank)


# ---- movements -------------------------------------------------------------------------------------------
def put(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    route: Route,
    rows: SymmetricTensor,
    row_weights: SymmetricTensor | None,
    signals: Signals,
    steps: Steps = Steps.BOTH,
) -> None:
    """Write ``x_TD[n // K]``, and the weight of slot n, where the route says; then a barrier: this rank's are there.

    Args:
        x_TD: of the dtype of the rows.
        weights_TK: fp32 (fp64 for fp64 rows), or None.
        route: of the slots.
        rows: (R, D).
        row_weights: (R), for the weights.
        signals: of the ranks.
        steps: both, except in tests.

    No rank may still read the buffers: there was a barrier since.
    """
    if signals.native is None:
        if steps & Steps.SIGNAL:
            theirs = None if row_weights is None else row_weights.all_ranks
            _put_reference(x_TD, weights_TK, route, rows.all_ranks, theirs)
        barrier(signals, steps)
        return
    x_TD, weights_TK = x_TD.contiguous(), None if weights_TK is None else weights_TK.contiguous()
    native.module("cuda").dispatch(
        native.place(x_TD), signals.native, _route(route), steps=int(steps), x=x_TD.data_ptr(),
        weights=native.pointer(weights_TK), rows=rows.peer_pointers_W.data_ptr(),
        row_weights=0 if row_weights is None else row_weights.peer_pointers_W.data_ptr(), tokens=x_TD.shape[0],
        width=x_TD.shape[1], top_k=route.expert_ids_TK.shape[1], dtype=native.DTYPE_CODES[x_TD.dtype],
    )  # fmt: skip


def get(
    rows: SymmetricTensor | None, row_scalars: SymmetricTensor | None, route: Route, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of each token's rows (T, D), in fp32 for half types, and the scalar of each slot's row (T, K).

    Args:
        rows: (R, D), or None.
        row_scalars: (R), fp32 (fp64 for fp64 rows), or None.
        route: of the slots; a dropped one gives 0.
        dtype: of the rows.

    There must have been a barrier since the rows were written.
    """
    tokens, top_k = route.expert_ids_TK.shape
    if (rows is not None and rows.all_ranks) or (row_scalars is not None and row_scalars.all_ranks):
        return (
            None if rows is None else _get_reference(rows.all_ranks, route),
            None if row_scalars is None else _get_scalars_reference(row_scalars.all_ranks, route),
        )
    device, width = route.dst_offset_E.device, 0 if rows is None else rows.own.shape[1]
    y_TD = None if rows is None else torch.empty(tokens, width, dtype=dtype, device=device)
    scalars_TK = None
    if row_scalars is not None:
        scalars_TK = torch.empty(tokens, top_k, dtype=accum_dtype(dtype), device=device)
    native.module("cuda").combine(
        native.place(route.dst_offset_E), _route(route), rows=0 if rows is None else rows.peer_pointers_W.data_ptr(),
        row_scalars=0 if row_scalars is None else row_scalars.peer_pointers_W.data_ptr(), y=native.pointer(y_TD),
        scalars=native.pointer(scalars_TK), tokens=tokens, width=width, top_k=top_k, dtype=native.DTYPE_CODES[dtype],
    )  # fmt: skip
    return y_TD, scalars_TK


def _route(route: Route) -> dict[str, int]:
    return {
        "expert_ids": route.expert_ids_TK.data_ptr(), "inverse_perm": route.inverse_perm_N.data_ptr(),
        "dst_offset": route.dst_offset_E.data_ptr(), "experts": route.dst_offset_E.shape[0],
        "local_experts": route.local_experts,
    }  # fmt: skip
