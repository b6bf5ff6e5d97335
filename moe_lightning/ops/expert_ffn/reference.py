"""The torch reference of `expert_ffn`: an expert at a time, in fp32 (fp64 for fp64), rounded where the kernels round.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moe_lightning.ops.library import accum_dtype


def _parts(expert_offsets: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of those that have any. Reads the offsets on the host."""
    offsets = expert_offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(offsets)) if b > a]


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.nn.functional.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _activate_backward(hidden: Tensor, activation: str, grad: Tensor) -> Tensor:
    if activation == "gelu":
        density = torch.exp(-0.5 * hidden**2) * (2 * torch.pi) ** -0.5
        return grad * (0.5 * (1 + torch.erf(hidden * 0.5**0.5)) + hidden * density)
    gate, up = hidden.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)


def _row_weights(weights_TK: Tensor | None, perm_N: Tensor | None, like: Tensor) -> Tensor:
    """(N, 1), wide."""
    if weights_TK is None or perm_N is None:
        return like.new_ones((like.shape[0], 1), dtype=accum_dtype(like.dtype))
    return weights_TK.reshape(-1, 1).index_select(0, perm_N).to(accum_dtype(like.dtype))


def forward(
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_offsets: Tensor,
    weights_TK: Tensor | None,
    perm_N: Tensor | None,
    activation: str,
    keep_hidden: bool,
    _sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs (N, D) and, if kept, hidden rows before the activation (N, G)."""
    dtype, wide = rows_ND.dtype, accum_dtype(rows_ND.dtype)
    out_ND = torch.zeros_like(rows_ND)
    hidden_NG = rows_ND.new_zeros(rows_ND.shape[0] if keep_hidden else 0, up_EGD.shape[1])
    weights_N1 = _row_weights(weights_TK, perm_N, rows_ND)
    for e, rows in _parts(expert_offsets):
        hidden = rows_ND[rows].to(wide) @ up_EGD[e].to(wide).T
        h = (weights_N1[rows] * _activate(hidden, activation)).to(dtype)
        out_ND[rows] = (h.to(wide) @ down_EDF[e].to(wide).T).to(dtype)
        if keep_hidden:
            hidden_NG[rows] = hidden.to(dtype)
    return out_ND, hidden_NG


def backward(
    grad_out_ND: Tensor,
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    hidden_NG: Tensor,
    expert_offsets: Tensor,
    weights_TK: Tensor | None,
    perm_N: Tensor | None,
    activation: str,
    fp32_weight_grads: bool,
    needs_rows: bool,
    needs_up: bool,
    needs_down: bool,
    _sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, up, down and weights; empty where they are not needed."""
    dtype, wide = rows_ND.dtype, accum_dtype(rows_ND.dtype)
    of_weights = torch.float32 if fp32_weight_grads else dtype
    wanted = (rows_ND, needs_rows), (up_EGD, needs_up), (down_EDF, needs_down), (weights_TK, weights_TK is not None)
    dtypes = dtype, of_weights, of_weights, None if weights_TK is None else weights_TK.dtype
    grad_rows_ND, grad_up_EGD, grad_down_EDF, grad_weights_TK = (
        rows_ND.new_zeros(t.shape if t is not None and wants else 0, dtype=of)
        for (t, wants), of in zip(wanted, dtypes, strict=True)
    )
    weights_N1 = _row_weights(weights_TK, perm_N, rows_ND)
    for e, rows in _parts(expert_offsets):
        hidden, grad_out = hidden_NG[rows].to(wide), grad_out_ND[rows].to(wide)
        grad_h, act = grad_out @ down_EDF[e].to(wide), _activate(hidden, activation)
        if weights_TK is not None and perm_N is not None:
            grad_weights_TK.view(-1)[perm_N[rows].long()] = (grad_h * act).sum(1).to(weights_TK.dtype)
        h = (weights_N1[rows] * act).to(dtype).to(wide)
        grad_hidden = _activate_backward(hidden, activation, weights_N1[rows] * grad_h).to(dtype).to(wide)
        if needs_down:
            grad_down_EDF[e] = (grad_out.T @ h).to(of_weights)
        if needs_up:
            grad_up_EGD[e] = (grad_hidden.T @ rows_ND[rows].to(wide)).to(of_weights)
        if needs_rows:
            grad_rows_ND[rows] = (grad_hidden @ up_EGD[e].to(wide)).to(dtype)
    return grad_rows_ND, grad_up_EGD, grad_down_EDF, grad_weights_TK
