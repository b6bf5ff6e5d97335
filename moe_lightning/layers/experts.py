"""The experts of one MoE layer: E feed-forward networks in stacked weights, computed by grouped products.

Legend: N rows, E experts, D d_model, F expert hidden size, G = 2F for SwiGLU (gate and up), F for GELU.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.layers.activation import Activation, activate, hidden_width
from moe_lightning.layers.grouped_linear import grouped_linear, loop_linear
from moe_lightning.layers.precision import compute_dtype
from moe_lightning.ops import RowWeights, expert_ffn
from moe_lightning.ops.expert_ffn import missing
from moe_lightning.utils.checks import check_choice

Implementation = Literal["auto", "cutlass", "grouped_mm", "loop"]


class Experts(nn.Module):
    """E experts, `down(act(up(x)))` each (SwiGLU: arXiv:2002.05202).

    Args:
        d_model: D.
        hidden_dim: F.
        num_experts: E.
        activation: "swiglu" or "gelu".
        implementation: "loop", one product an expert, the readable reference; "grouped_mm",
            `torch.nn.functional.grouped_mm`; "cutlass", our kernels (`moe_lightning.ops.expert_ffn`); "auto", the
            first of cutlass (fp16 and bf16 on a GPU), grouped_mm (not fp64) and the loop that supports the case. The
            first two need D and F to be multiples of 8.

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
        self.aligned = d_model % 8 == 0 and hidden_dim % 8 == 0
        if implementation in ("cutlass", "grouped_mm") and not self.aligned:
            raise ValueError(
                f"experts: {implementation} needs d_model and hidden_dim to be multiples of 8, got d_model={d_model}, "
                f"hidden_dim={hidden_dim}; use experts=loop"
            )
        self.activation: Activation = activation
        self.implementation: Implementation = implementation
        self.up = nn.Parameter(torch.empty(num_experts, hidden_width(activation, hidden_dim), d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02)."""
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def choose(self, dtype: torch.dtype, device: torch.device) -> Implementation:
        """What computes rows of this dtype on this device."""
        if self.implementation in ("auto", "cutlass"):
            reason = missing(dtype, device, self.down.shape[1], self.down.shape[2])
            if reason is None:
                return "cutlass"
            if self.implementation == "cutlass":
                raise ValueError(f"experts: cutlass is not possible: {reason}; or use experts=auto")
        return "grouped_mm" if self.implementation != "loop" and self.aligned and dtype != torch.float64 else "loop"

    def fuses_weights(self, rows: Tensor) -> bool:
        """Whether rows like these get their combine weights as part of the second product: cheaper than afterwards."""
        return self.choose(compute_dtype(rows), rows.device) == "cutlass"

    @override
    def forward(self, rows: Tensor, expert_offsets: Tensor | None, row_weights: RowWeights | None = None) -> Tensor:
        """Rows (N, D) sorted by expert, with int32 offsets (E + 1); or (E, T, D), all rows to all experts, with None.

        With `row_weights` each row comes back scaled by its combine weight. Rows after the last offset come back
        undefined.
        """
        dtype = compute_dtype(rows)
        up, down = self.up.to(dtype), self.down.to(dtype)
        if expert_offsets is None:
            hidden = torch.bmm(rows, up.mT.to(rows.dtype))
            return torch.bmm(activate(hidden, self.activation), down.mT.to(rows.dtype))
        implementation = self.choose(dtype, rows.device)
        return expert_rows(rows, up, down, expert_offsets, row_weights, self.activation, implementation)

    @override
    def extra_repr(self) -> str:
        num_experts, d_model, hidden_dim = self.down.shape
        return (
            f"num_experts={num_experts}, d_model={d_model}, hidden_dim={hidden_dim}, "
            f"activation={self.activation}, implementation={self.implementation}"
        )


def expert_rows(
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    expert_offsets: Tensor,
    row_weights: RowWeights | None,
    activation: Activation,
    implementation: Implementation,
    **cutlass: Any,
) -> Tensor:
    """Rows (N, D) sorted by expert through stacked weights up (E, G, D) and down (E, D, F), by one implementation.

    `cutlass` are options of `ops.expert_ffn`, which the other implementations have no use for.
    """
    dtype = compute_dtype(rows)
    if implementation == "cutlass":
        if rows.dtype != dtype:
            cutlass.pop("out", None)
        return expert_ffn(rows.to(dtype), up, down, expert_offsets, activation, row_weights, **cutlass)
    linear = grouped_linear if implementation == "grouped_mm" else loop_linear
    hidden_NF = activate(linear(rows, up, expert_offsets), activation)
    if row_weights is not None:
        weights_N = row_weights.weights_TK.flatten()[row_weights.perm_N]
        hidden_NF = (hidden_NF * weights_N[:, None]).to(hidden_NF.dtype)
    return linear(hidden_NF, down, expert_offsets)
