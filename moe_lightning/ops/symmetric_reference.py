"""The torch reference of movement between ranks through each other's memory, which is also what the CPU runs.

Legend: W ranks, E experts, L = E / W of a rank, T tokens, K top_k, N = T * K slots, D width, R rows of a rank's buffer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.ops.dtypes import sum_dtype


def layout(counts_WE: Tensor, own_offsets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """From the rows each rank has for each expert: int32 offsets (L + 1) of the rows that come here, and shift_E.

    A slot of expert e lies at row ``shift_E[e] + inverse_perm_N[slot]`` of the expert's rank.
    """
    world, experts = counts_WE.shape
    totals_WL = counts_WE.sum(0).view(world, experts // world)
    begins_WL = totals_WL.cumsum(1) - totals_WL
    shift_E = begins_WL.flatten() + counts_WE[:rank].sum(0) - own_offsets[:-1]
    expert_offsets = torch.cat([begins_WL[rank], totals_WL[rank].sum()[None]])
    return expert_offsets.int(), shift_E.int()


def places(
    expert_ids_TK: Tensor, inverse_perm_N: Tensor, shift_E: Tensor, local_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots that are not dropped, the rank that each goes to, and its row there."""
    ids_N = expert_ids_TK.reshape(-1).long()
    slots = ((ids_N >= 0) & (ids_N < shift_E.shape[0])).nonzero().flatten()
    ids = ids_N[slots]
    return slots, ids // local_experts, shift_E[ids].long() + inverse_perm_N[slots]


def push(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    route: tuple[Tensor, Tensor, Tensor, int],
    rows_W: Sequence[Tensor],
    row_weights_W: Sequence[Tensor] | None,
) -> None:
    """Write each slot's row, and its weight, where it goes."""
    slots, ranks, rows = places(*route)
    top_k = route[0].shape[1]
    for rank, rows_RD in enumerate(rows_W):
        here = ranks == rank
        rows_RD[rows[here]] = x_TD[slots[here] // top_k]
        if weights_TK is not None and row_weights_W is not None:
            row_weights_W[rank][rows[here]] = weights_TK.reshape(-1)[slots[here]]


def pull(rows_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """Sums of each token's rows (T, D)."""
    slots_ND = _gather(rows_W, route)
    top_k, wide = route[0].shape[1], sum_dtype(slots_ND.dtype)
    return slots_ND.view(-1, top_k, slots_ND.shape[1]).sum(1, dtype=wide).to(slots_ND.dtype)


def pull_scalars(row_scalars_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    """The scalar of each slot's row (T, K); 0 where it was dropped."""
    return _gather(row_scalars_W, route).view(route[0].shape)


def _gather(rows_W: Sequence[Tensor], route: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    slots, ranks, rows = places(*route)
    gathered = rows_W[0].new_zeros(route[0].numel(), *rows_W[0].shape[1:])
    for rank, theirs in enumerate(rows_W):
        here = ranks == rank
        gathered[slots[here]] = theirs[rows[here]]
    return gathered
