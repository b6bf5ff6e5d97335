"""Local movement of rows: into expert order, and back as a weighted sum.

Shapes: T tokens, D width, K = top_k, N = T * K slots. Both directions of both functions are gathers, so
nothing is added atomically and the bits are the same on every run. Sums are taken in fp32 for half types.

``may_drop`` says that the index may hold dropped slots: these then give exactly 0, in the forward and in
every gradient, even where their rows hold garbage. Without it the masks are not paid for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.ops.index import RoutingIndex


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tokens(perm_N: Tensor, top_k: int) -> Tensor:
    return perm_N if top_k == 1 else torch.div(perm_N, top_k, rounding_mode="floor")


def _dropped_rows(index: RoutingIndex) -> Tensor:
    """(N, 1): rows behind the last expert's."""
    rows_N = torch.arange(index.perm_N.shape[0], device=index.perm_N.device)
    return (rows_N >= index.expert_offsets[-1])[:, None]


def _dropped_slots(index: RoutingIndex, top_k: int) -> Tensor:
    """(T, K): slots whose row is behind the last expert's."""
    return (index.inverse_perm_N >= index.expert_offsets[-1]).view(-1, top_k)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, offsets: Tensor, perm_N: Tensor, inverse_N: Tensor, top_k: int, may_drop: bool
    ) -> Tensor:
        ctx.save_for_backward(offsets, perm_N, inverse_N)
        ctx.top_k, ctx.may_drop = top_k, may_drop
        return x_TD.index_select(0, _tokens(perm_N, top_k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        index = RoutingIndex(*ctx.saved_tensors)
        slots_TKD = grad_ND.index_select(0, index.inverse_perm_N).view(-1, ctx.top_k, grad_ND.shape[1])
        if ctx.may_drop:
            slots_TKD = slots_TKD.masked_fill(_dropped_slots(index, ctx.top_k)[:, :, None], 0)
        grad_TD = slots_TKD.sum(1, dtype=_sum_dtype(grad_ND.dtype)).to(grad_ND.dtype)
        return grad_TD, None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weights_TK: Tensor,
        offsets: Tensor,
        perm_N: Tensor,
        inverse_N: Tensor,
        may_drop: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK, offsets, perm_N, inverse_N)
        ctx.may_drop = may_drop
        top_k = weights_TK.shape[1]
        slots_TKD = rows_ND.index_select(0, inverse_N).view(-1, top_k, rows_ND.shape[1])
        weighted_TKD = slots_TKD * weights_TK.to(_sum_dtype(rows_ND.dtype))[:, :, None]
        if may_drop:
            dropped_TK = _dropped_slots(RoutingIndex(offsets, perm_N, inverse_N), top_k)
            weighted_TKD = weighted_TKD.masked_fill(dropped_TK[:, :, None], 0)
        return weighted_TKD.sum(1).to(rows_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_TK, *index_tensors = ctx.saved_tensors
        index = RoutingIndex(*index_tensors)
        top_k, sum_dtype = weights_TK.shape[1], _sum_dtype(rows_ND.dtype)
        grad_rows_ND = grad_weights_TK = None
        grad_slots_ND = grad_TD.index_select(0, _tokens(index.perm_N, top_k))  # grad of y, in row order
        if ctx.needs_input_grad[0]:
            weights_N = weights_TK.reshape(-1).to(sum_dtype).index_select(0, index.perm_N)
            grad_rows_ND = (grad_slots_ND * weights_N[:, None]).to(rows_ND.dtype)
            if ctx.may_drop:
                grad_rows_ND = grad_rows_ND.masked_fill(_dropped_rows(index), 0)
        if ctx.needs_input_grad[1]:
            dots_N = (grad_slots_ND.to(sum_dtype) * rows_ND).sum(1)
            grad_weights_TK = dots_N.index_select(0, index.inverse_perm_N).view(-1, top_k)
            if ctx.may_drop:
                grad_weights_TK = grad_weights_TK.masked_fill(_dropped_slots(index, top_k), 0)
            grad_weights_TK = grad_weights_TK.to(weights_TK.dtype)
        return grad_rows_ND, grad_weights_TK, None, None, None, None


def permute(x_TD: Tensor, index: RoutingIndex, top_k: int, may_drop: bool = False) -> Tensor:
    """Gather tokens into expert order: ``rows_ND[r] = x_TD[perm_N[r] // top_k]``.

    Rows of dropped slots stand behind the last expert's and hold their token all the same.

    Raises:
        ValueError: x is not (T, D) with T * top_k slots in the index.
    """
    if x_TD.dim() != 2 or x_TD.shape[0] * top_k != index.perm_N.shape[0]:
        raise ValueError(
            "ops.permute: x must have shape (tokens, width) with tokens * top_k slots in the index, "
            f"got {tuple(x_TD.shape)}, top_k={top_k}, slots={index.perm_N.shape[0]}"
        )
    return _Permute.apply(x_TD, *index, top_k, may_drop)


def unpermute(rows_ND: Tensor, weights_TK: Tensor, index: RoutingIndex, may_drop: bool = False) -> Tensor:
    """Bring rows back: ``y_TD[t] = sum_k weights_TK[t, k] * rows_ND[inverse_perm_N[t * K + k]]``.

    The sum is taken in fp32 (fp64 for fp64 rows) and returned in the dtype of the rows.

    Raises:
        ValueError: rows are not (N, D), or weights not (T, K), for the N slots of the index.
    """
    slots = index.perm_N.shape[0]
    shapes_fit = rows_ND.shape[0] == slots and weights_TK.numel() == slots
    if rows_ND.dim() != 2 or weights_TK.dim() != 2 or not shapes_fit:
        raise ValueError(
            "ops.unpermute: rows must have shape (slots, width) and weights (tokens, top_k), "
            f"got {tuple(rows_ND.shape)}, {tuple(weights_TK.shape)}, slots={slots}"
        )
    return _Unpermute.apply(rows_ND, weights_TK, *index, may_drop)
