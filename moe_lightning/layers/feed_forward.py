"""The dense feed-forward network, the baseline of an MoE layer, and the activations of both."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moe_lightning.layers.low_precision import Linear

Activation = Literal["swiglu", "gelu"]


def hidden_width(activation: Activation, hidden_dim: int) -> int:
    """Columns of the up projection: SwiGLU takes gate, then up."""
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation: must be 'swiglu' or 'gelu', got {activation!r}")
    return 2 * hidden_dim if activation == "swiglu" else hidden_dim


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """(..., hidden_width) -> (..., hidden_dim); SwiGLU: silu(gate) * up (arXiv:2002.05202)."""
    if activation == "gelu":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """`down(act(up(x)))` without biases, (..., D) -> (..., D)."""

    def __init__(self, d_model: int, hidden_dim: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = Linear(d_model, hidden_width(activation, hidden_dim), bias=False)
        self.down = Linear(hidden_dim, d_model, bias=False)

    @override
    def forward(self, x: Tensor, tokens: Any = None) -> tuple[Tensor, None]:
        """The output, and no routing; of no use are the tokens that an MoE layer takes in its place."""
        return self.down(activate(self.up(x), self.activation)), None
