"""Activations of a feed-forward network and the width they need from the up projection."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["swiglu", "gelu"]


def hidden_width(activation: Activation, hidden_dim: int) -> int:
    """Columns of the up projection: SwiGLU takes gate and up side by side."""
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation: must be 'swiglu' or 'gelu', got {activation!r}")
    return 2 * hidden_dim if activation == "swiglu" else hidden_dim


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """(..., hidden_width) -> (..., hidden_dim); SwiGLU: silu(gate) * up (arXiv:2002.05202)."""
    if activation == "gelu":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up
