"""The torch reference of row movement, which is also what the CPU runs.

Shapes: T tokens, D width, K = top_k, N = T * K slots.
"""

import torch
from torch import Tensor

from moe_lightning.ops.dtypes import sum_dtype


def _tokens(perm_N: Tensor, top_k: int) -> Tensor:
    return perm_N if top_k == 1 else torch.div(perm_N, top_k, rounding_mode="floor")


def _dropped_slots(expert_offsets: Tensor, inverse_perm_N: Tensor, top_k: int) -> Tensor:
    """(T, K, 1): slots whose row is behind the last expert's."""
    return (inverse_perm_N >= expert_offsets[-1]).view(-1, top_k, 1)


def permute(x_TD: Tensor, perm_N: Tensor, inverse_perm_N: Tensor, top_k: int) -> Tensor:
    """Rows (N, D) in expert order."""
    return x_TD.index_select(0, _tokens(perm_N, top_k))


def permute_backward(
    grad_ND: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, top_k: int, may_drop: bool
) -> Tensor:
    """Sums over the slots of a token."""
    slots_TKD = grad_ND.index_select(0, inverse_perm_N).view(-1, top_k, grad_ND.shape[1])
    if may_drop:
        slots_TKD = slots_TKD.masked_fill(_dropped_slots(expert_offsets, inverse_perm_N, top_k), 0)
    return slots_TKD.sum(1, dtype=sum_dtype(grad_ND.dtype)).to(grad_ND.dtype)


def unpermute(
    rows_ND: Tensor, weights_TK: Tensor, expert_offsets: Tensor, inverse_perm_N: Tensor, may_drop: bool
) -> Tensor:
    """Weighted sums over the slots of a token."""
    top_k = weights_TK.shape[1]
    slots_TKD = rows_ND.index_select(0, inverse_perm_N).view(-1, top_k, rows_ND.shape[1])
    weighted_TKD = slots_TKD * weights_TK.to(sum_dtype(rows_ND.dtype))[:, :, None]
    if may_drop:
        weighted_TKD = weighted_TKD.masked_fill(_dropped_slots(expert_offsets, inverse_perm_N, top_k), 0)
    return weighted_TKD.sum(1).to(rows_ND.dtype)


def unpermute_backward(
    grad_TD: Tensor,
    rows_ND: Tensor,
    weights_TK: Tensor,
    expert_offsets: Tensor,
    perm_N: Tensor,
    inverse_perm_N: Tensor,
    may_drop: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of weights."""
    top_k, wide = weights_TK.shape[1], sum_dtype(rows_ND.dtype)
    grad_slots_ND = grad_TD.index_select(0, _tokens(perm_N, top_k))  # grad of y, in row order
    weights_N = weights_TK.reshape(-1).to(wide).index_select(0, perm_N)
    grad_rows_ND = (grad_slots_ND * weights_N[:, None]).to(rows_ND.dtype)
    dots_N = (grad_slots_ND.to(wide) * rows_ND).sum(1)
    grad_weights_TK = dots_N.index_select(0, inverse_perm_N).view(-1, top_k).to(weights_TK.dtype)
    if may_drop:
        rows_N = torch.arange(perm_N.shape[0], device=perm_N.device)
        grad_rows_ND = grad_rows_ND.masked_fill((rows_N >= expert_offsets[-1])[:, None], 0)
        dropped_TK = _dropped_slots(expert_offsets, inverse_perm_N, top_k)[:, :, 0]
        grad_weights_TK = grad_weights_TK.masked_fill(dropped_TK, 0)
    return grad_rows_ND, grad_weights_TK
