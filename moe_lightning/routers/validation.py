"""The range of every router argument, checked in one place."""

from __future__ import annotations

import math

import torch

from moe_lightning.utils.checks import check_sizes


def check_router_arguments(
    d_model: int,
    num_experts: int,
    top_k: int,
    skew_experts: int,
    skew_bias: float,
    capacity_factor: float | None,
) -> None:
    """Raise ValueError, naming the argument, if one is out of range."""
    check_sizes("router", d_model=d_model, num_experts=num_experts)
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"router: top_k must be in [1, num_experts], got top_k={top_k}, num_experts={num_experts}; "
            "lower top_k or add experts"
        )
    if not 0 <= skew_experts <= num_experts:
        raise ValueError(
            f"router: skew_experts must be in [0, num_experts], got skew_experts={skew_experts}, "
            f"num_experts={num_experts}"
        )
    if not abs(skew_bias) <= torch.finfo(torch.float32).max:
        raise ValueError(f"router: skew_bias must be finite in fp32, got skew_bias={skew_bias}")
    if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(
            f"router: capacity_factor must be positive and finite, got capacity_factor={capacity_factor}; "
            "null means no limit"
        )
