"""Causal multi-head self-attention with rotary positions (RoFormer, arXiv:2104.09864), halves rotated as in GPT-NeoX.

Legend: B batch, S sequence, D d_model, H heads, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moe_lightning.layers.low_precision import Linear
from moe_lightning.ops.library import accum_dtype


class Attention(nn.Module):
    """`scaled_dot_product_attention` over H heads; (B, S, D) -> (B, S, D).

    Raises:
        ValueError: d_model is not divisible by n_heads, or the head dimension is odd (RoPE rotates pairs).
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"attention: d_model must be divisible by n_heads, got d_model={d_model}, n_heads={n_heads}"
            )
        if (d_model // n_heads) % 2:
            raise ValueError(
                f"attention: d_model / n_heads must be even for rotary positions, got d_model={d_model}, "
                f"n_heads={n_heads}"
            )
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.out = Linear(d_model, d_model, bias=False)

    @override
    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """Each position attends to itself and those before it."""
        batch, seq_len, d_model = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, seq_len, 3, self.n_heads, d_model // self.n_heads)
        q_BHSC, k_BHSC, v_BHSC = qkv.permute(2, 0, 3, 1, 4)
        if batch == 0:  # CUDA's fused kernels return None for it
            return self.out(v_BHSC.reshape(batch, seq_len, d_model))
        y_BHSC = F.scaled_dot_product_attention(
            rotate(q_BHSC, cos_SC, sin_SC),
            rotate(k_BHSC, cos_SC, sin_SC),
            v_BHSC,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out(y_BHSC.transpose(1, 2).reshape(batch, seq_len, d_model))


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 (S, C)."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta**-exponents)
    angles_SC = torch.cat([angles, angles], -1)
    return angles_SC.cos(), angles_SC.sin()


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotate each pair (c, c + C/2) by its position's angle, in fp32 (fp64 for fp64); dtype kept."""
    x = x_BHSC.to(accum_dtype(x_BHSC.dtype))
    first, second = x.chunk(2, -1)
    return (x * cos_SC + torch.cat([-second, first], -1) * sin_SC).to(x_BHSC.dtype)
