"""The roofline (speed of light, SOL): fewest bytes and FLOPs of each phase, and the least time they take here.

The machine's peaks are a large copy and a large matrix product, timed in the run that they are compared with.

Legend: T tokens, D d_model, F expert hidden size, E experts, K top_k, N = T * K, s bytes of a number.

Every input is read once and every output written once; what a phase keeps for itself costs nothing. Weights and
indices are 4 bytes. Under masked movement the "order" is a mask (T, E) and every expert sees every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from moe_lightning.bench.spread import Spread
from moe_lightning.bench.timers import seconds_per_call

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far beyond any cache
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer and its batch; `size` is the bytes of a number."""

    tokens: int
    d_model: int
    num_experts: int
    top_k: int
    mlp_hidden_dim: int
    size: int

    @property
    def slots(self) -> int:
        """N."""
        return self.tokens * self.top_k

    @property
    def expert_weights(self) -> int:
        """Numbers in the experts: SwiGLU has three matrices per expert."""
        return 3 * self.num_experts * self.mlp_hidden_dim * self.d_model


@dataclass(frozen=True)
class Cost:
    """Bytes that must be read and written, and floating-point operations."""

    reads: int
    writes: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.reads + self.writes


@dataclass(frozen=True)
class Peaks:
    """The machine's measured peaks in this run: bytes and FLOPs per second."""

    copy: float
    matmul: float
    spread: dict[str, Spread] = field(default_factory=dict)
    """Seconds of either, over the rounds."""

    def roofline_us(self, cost: Cost) -> float:
        """The roofline bound of a cost in microseconds: memory or arithmetic, whichever takes longer."""
        return 1e6 * max(cost.bytes / self.copy, cost.flops / self.matmul)


def forward_costs(shape: Shape, masked: bool, fused_weights: bool = False) -> dict[str, Cost]:
    """Cost of each forward phase, by name; `fused_weights`: the experts scale the rows by the combine weights."""
    tokens, experts, slots, size = shape.tokens, shape.num_experts, shape.slots, shape.size
    x_TD, rows_ND, logits_TE = (n * size for n in (tokens * shape.d_model, slots * shape.d_model, tokens * experts))
    gate_ED, mask_TE, rows_ETD = experts * shape.d_model * size, 4 * tokens * experts, experts * x_TD
    weights = shape.expert_weights * size
    costs = {
        "T_logit": Cost(x_TD + gate_ED, logits_TE, 2 * tokens * shape.d_model * experts),
        "T_select": Cost(logits_TE, slots * (4 + 4) + experts * 4),
    }
    flops = 2 * 3 * shape.mlp_hidden_dim * shape.d_model  # a row through one expert
    if masked:
        return costs | {
            "T_index": Cost(slots * (4 + 4), mask_TE),
            "T_permute": Cost(0, 0),  # a view
            "T_experts": Cost(x_TD + weights, rows_ETD, flops * tokens * experts),
            "T_unpack": Cost(rows_ETD + mask_TE, x_TD),
        }
    scales = slots * (4 + 4) if fused_weights else 0  # the weights, and which row has which
    return costs | {
        "T_index": Cost(slots * 4, 2 * slots * 4 + (experts + 1) * 4),
        "T_permute": Cost(x_TD + slots * 4, rows_ND),
        "T_experts": Cost(rows_ND + weights + (experts + 1) * 4 + scales, rows_ND, flops * slots),
        "T_unpack": Cost(rows_ND + slots * (4 if fused_weights else 4 + 4), x_TD),
    }


def backward_costs(shape: Shape, masked: bool, fused_weights: bool = False) -> dict[str, Cost]:
    """Cost of each backward phase: gradients of the outputs in, gradients of the inputs out.

    T_logit also adds the gradient that reaches x through the rows, as a layer's backward pass does. With
    `fused_weights` the experts compute the gradient of the combine weights.
    """
    tokens, experts, slots, size = shape.tokens, shape.num_experts, shape.slots, shape.size
    x_TD, rows_ND, logits_TE = (n * size for n in (tokens * shape.d_model, slots * shape.d_model, tokens * experts))
    gate_ED, mask_TE, rows_ETD = experts * shape.d_model * size, 4 * tokens * experts, experts * x_TD
    weights = shape.expert_weights * size
    flops = 2 * forward_costs(shape, masked)["T_experts"].flops
    costs = {
        "T_logit": Cost(logits_TE + 2 * x_TD + gate_ED, x_TD + gate_ED, 4 * tokens * shape.d_model * experts),
        "T_select": Cost(slots * (4 + 4 + 4), logits_TE),  # weights, their gradients and ids; dense out
    }
    if masked:
        return costs | {
            "T_pack": Cost(rows_ETD + mask_TE + slots * 4, x_TD + slots * 4),
            "T_experts": Cost(x_TD + rows_ETD + weights, rows_ETD + weights, flops),
            "T_unpack": Cost(x_TD + rows_ETD + mask_TE, rows_ETD + mask_TE),
        }
    costs["T_pack"] = Cost(rows_ND + slots * 4, x_TD)
    if fused_weights:
        return costs | {
            "T_experts": Cost(
                2 * rows_ND + weights + (experts + 1) * 4 + slots * (4 + 4), rows_ND + weights + slots * 4, flops
            ),
            "T_unpack": Cost(x_TD + slots * 4, rows_ND),
        }
    return costs | {
        "T_experts": Cost(2 * rows_ND + weights + (experts + 1) * 4, rows_ND + weights, flops),
        "T_unpack": Cost(x_TD + rows_ND + slots * (4 + 4), rows_ND + slots * 4),
    }


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Copy bandwidth (bytes read plus bytes written per second) and FLOPs per second in `dtype`: best of 3 medians."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copies, products = _seconds_of_copies(device), _rounds(lambda: left @ right, device)
    spread = {"copy": Spread.of(copies), "matmul": Spread.of(products)}
    return Peaks(2 * COPY_BYTES[device.type] / min(copies), 2 * size**3 / min(products), spread)


def _seconds_of_copies(device: torch.device) -> list[float]:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    if device.type == "cpu":
        return _rounds(lambda: target.copy_(source), device)
    # On a GPU copy_ is a copy engine's job; a kernel that writes what it reads is what the phases are made of.
    return _rounds(lambda: torch.neg(source, out=target), device)


def _rounds(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Three medians of five calls."""
    call()
    return [median(seconds_per_call(call, 1, device) for _ in range(5)) for _ in range(3)]
