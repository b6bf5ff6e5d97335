"""The experts of one MoE layer: E feed-forward networks in stacked weights, computed by grouped products.

Legend: N rows, E experts, D d_model, F expert hidden size, G = 2F for SwiGLU (gate and up), F for GELU;
I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moe_lightning.layers.feed_forward import Activation, activate, hidden_width
from moe_lightning.layers.low_precision import HasProductWeights
from moe_lightning.ops import RowWeights, expert_ffn
from moe_lightning.ops.expert_ffn import Added, missing
from moe_lightning.utils.checks import check_choice

Implementation = Literal["auto", "cutlass", "grouped_mm", "loop"]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's, where it is on: it knows neither stacked weights nor grouped products, so they are cast by hand."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class Experts(HasProductWeights):
    """E experts, `down(act(up(x)))` each (SwiGLU: arXiv:2002.05202).

    Args:
        d_model: D.
        hidden_dim: F.
        num_experts: E.
        activation: "swiglu" or "gelu".
        implementation: "loop", one product per expert, the readable reference; "grouped_mm",
            `torch.nn.functional.grouped_mm`; "cutlass", our kernels (`moe_lightning.ops.expert_ffn`); "auto", the
            first of cutlass (fp16 and bf16 on a GPU), grouped_mm (not fp64) and the loop that supports the case. The
            first two need D and F to be multiples of 8.

    The layout, [E, out, in], is that of transformers' stacked experts. While `adds_gradients`, kernels that can add the
    gradients of the weights to those that are there do so, and autograd sees none: for weights without hooks, whose
    gradient has been begun. `adding_gradients` sets it.
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
        self.adds_gradients = False
        self.activation: Activation = activation
        self.implementation: Implementation = implementation
        self.up = nn.Parameter(torch.empty(num_experts, hidden_width(activation, hidden_dim), d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02)."""
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def implementation_for(self, dtype: torch.dtype, device: torch.device) -> Implementation:
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
        return self.implementation_for(compute_dtype(rows), rows.device) == "cutlass"

    @override
    def forward(self, rows: Tensor, expert_offsets: Tensor | None, row_weights: RowWeights | None = None) -> Tensor:
        """Rows (N, D) sorted by expert, with int32 offsets (E + 1); or (E, T, D), all rows to all experts, with None.

        With `row_weights` each row comes back scaled by its combine weight. Rows after the last offset come back
        undefined.
        """
        dtype = compute_dtype(rows)
        if expert_offsets is None:
            up, down = (self.product_weight(name).to(rows.dtype) for name in ("up", "down"))
            return torch.bmm(activate(torch.bmm(rows, up.mT), self.activation), down.mT)
        implementation = self.implementation_for(dtype, rows.device)
        up, down, cutlass = self.factors(implementation, dtype)
        if self.adds_gradients and cutlass and self.up.grad is not None and self.down.grad is not None:
            cutlass["weight_grads"] = Added(self.up.grad, self.down.grad)
        return expert_rows(rows, up, down, expert_offsets, row_weights, self.activation, implementation, **cutlass)

    def factors(self, implementation: Implementation, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """What `expert_rows` takes: up and down, and options of ours where these are fp32 weights themselves."""
        if implementation != "cutlass" or self.up.dtype != torch.float32:
            up, down = (self.product_weight(name).to(dtype) for name in ("up", "down"))
            return up, down, {}
        copies = self.weight_copies.get("up"), self.weight_copies.get("down")
        made = all(copy is not None and copy.dtype == dtype for copy in copies)
        return self.up, self.down, {"copies": copies if made else None}

    @override
    def extra_repr(self) -> str:
        num_experts, d_model, hidden_dim = self.down.shape
        return (
            f"num_experts={num_experts}, d_model={d_model}, hidden_dim={hidden_dim}, "
            f"activation={self.activation}, implementation={self.implementation}"
        )


@contextmanager
def adding_gradients(experts: Iterable[Experts], adds: bool = True) -> Iterator[None]:
    """Of passes, forward and backward, that are made meanwhile; see `Experts`."""
    for each in experts:
        each.adds_gradients = adds
    try:
        yield
    finally:
        for each in experts:
            each.adds_gradients = False


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


def loop_linear(rows_NI: Tensor, weight_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """One product per expert; rows after the last offset are zero. On a GPU it synchronises: it reads the offsets."""
    offsets = expert_offsets.tolist()
    weight_EOI = weight_EOI.to(compute_dtype(rows_NI))
    parts = [
        F.linear(rows_NI[start:end].to(weight_EOI.dtype), weight_OI)
        for start, end, weight_OI in zip(offsets[:-1], offsets[1:], weight_EOI, strict=True)
    ]
    tail = parts[0].new_zeros(rows_NI.shape[0] - offsets[-1], weight_EOI.shape[1])
    return torch.cat([*parts, tail])


def grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` with offsets on the device. Rows after the last offset are undefined.

    In bf16 on sm_90 one kernel that never waits; in fp32 and fp16 torch loops over the groups and reads the offsets.
    """
    dtype = compute_dtype(rows_NI)
    product = F.grouped_mm if dtype == torch.bfloat16 else _eager_grouped_mm
    return product(rows_NI.to(dtype), weight_EOI.to(dtype).mT, offs=expert_offsets[1:])


#: torch.compile knows the shape of the bf16 product only.
_eager_grouped_mm = torch.compiler.disable(F.grouped_mm)
