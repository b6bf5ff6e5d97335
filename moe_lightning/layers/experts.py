"""The experts of one MoE layer: E feed-forward networks in stacked weights, computed by a grouped product.

Legend: N rows, E experts, D d_model, F expert hidden size, G = 2F for SwiGLU (gate and up), F for GELU.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_lightning.checks import check_choice
from moe_lightning.layers.activation import Activation, activate, hidden_width
from moe_lightning.layers.grouped_linear import grouped_linear, loop_linear

Implementation = Literal["auto", "grouped_mm", "loop"]


class Experts(nn.Module):
    """E experts, `down(act(up(x)))` each (SwiGLU: arXiv:2002.05202).

    Args:
        d_model: D.
        hidden_dim: F.
        num_experts: E.
        activation: "swiglu" or "gelu".
        implementation: "loop", one product an expert, the readable reference; "grouped_mm",
            `torch.nn.functional.grouped_mm`; "auto", grouped_mm where it supports the case
            (D and F multiples of 8, not fp64) and the loop elsewhere.

    The layout, [E, out, in], is that of transformers' stacked experts.
    """

    def __init__(
        self,
        d_model: int,
        hidden_dim: int,
        num_experts: int,
        activation: Activation = "swiglu",
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        check_choice("experts", "implementation", implementation, get_args(Implementation))
        aligned = d_model % 8 == 0 and hidden_dim % 8 == 0
        if implementation == "grouped_mm" and not aligned:
            raise ValueError(
                f"experts: grouped_mm needs d_model and hidden_dim to be multiples of 8, got d_model={d_model}, "
                f"hidden_dim={hidden_dim}; use experts=loop"
            )
        self.activation: Activation = activation
        self.implementation = implementation
        self.grouped = implementation == "grouped_mm" or (implementation == "auto" and aligned)
        self.up = nn.Parameter(torch.empty(num_experts, hidden_width(activation, hidden_dim), d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02)."""
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, rows: Tensor, expert_offsets: Tensor | None) -> Tensor:
        """Rows (N, D) sorted by expert, with int32 offsets (E + 1); or (E, T, D), all rows to all experts, with None.

        Rows behind the last offset come back undefined.
        """
        if expert_offsets is None:
            hidden = torch.bmm(rows, self.up.mT.to(rows.dtype))
            return torch.bmm(activate(hidden, self.activation), self.down.mT.to(rows.dtype))
        linear = grouped_linear if self.grouped and rows.dtype != torch.float64 else loop_linear
        hidden_NG = linear(rows, self.up, expert_offsets)
        return linear(activate(hidden_NG, self.activation), self.down, expert_offsets)

    def extra_repr(self) -> str:
        """Sizes, for `print(experts)`."""
        num_experts, d_model, hidden_dim = self.down.shape
        return (
            f"num_experts={num_experts}, d_model={d_model}, hidden_dim={hidden_dim}, "
            f"activation={self.activation}, implementation={'grouped_mm' if self.grouped else 'loop'}"
        )
