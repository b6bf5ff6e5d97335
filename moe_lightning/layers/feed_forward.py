"""The dense feed-forward network, the baseline an MoE layer stands beside."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lightning.layers.activation import Activation, activate, hidden_width


class FeedForward(nn.Module):
    """`down(act(up(x)))` without biases, (..., D) -> (..., D)."""

    def __init__(self, d_model: int, hidden_dim: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = nn.Linear(d_model, hidden_width(activation, hidden_dim), bias=False)
        self.down = nn.Linear(hidden_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The output, and no routing: a dense layer makes no choice."""
        return self.down(activate(self.up(x), self.activation)), None
