"""Causal multi-head self-attention with rotary positions.

Legend: B batch, S sequence, D d_model, H heads, C head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moe_lightning.layers.rope import rotate


class Attention(nn.Module):
    """`scaled_dot_product_attention` over H heads; (B, S, D) -> (B, S, D).

    Raises:
        ValueError: d_model is not divisible by n_heads, or the head dimension is odd (RoPE turns pairs).
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
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """Each position attends to itself and those before it."""
        batch, seq_len, d_model = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, seq_len, 3, self.n_heads, d_model // self.n_heads)
        q_BHSC, k_BHSC, v_BHSC = qkv.permute(2, 0, 3, 1, 4)
        if batch == 0:  # of which CUDA's fused kernels make None
            return self.out(v_BHSC.reshape(batch, seq_len, d_model))
        y_BHSC = F.scaled_dot_product_attention(
            rotate(q_BHSC, cos_SC, sin_SC),
            rotate(k_BHSC, cos_SC, sin_SC),
            v_BHSC,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out(y_BHSC.transpose(1, 2).reshape(batch, seq_len, d_model))
