"""Rotary position embedding (RoFormer, arXiv:2104.09864), halves rotated as in GPT-NeoX and Llama.

Legend: B batch, H heads, S sequence, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.ops.library import accum_dtype


def rope_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 (S, C)."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta**-exponents)
    angles_SC = torch.cat([angles, angles], -1)
    return angles_SC.cos(), angles_SC.sin()


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Turn each pair (c, c + C/2) by its position's angle, in fp32 (fp64 for fp64); dtype kept."""
    x = x_BHSC.to(accum_dtype(x_BHSC.dtype))
    first, second = x.chunk(2, -1)
    return (x * cos_SC + torch.cat([-second, first], -1) * sin_SC).to(x_BHSC.dtype)
