"""`masked_matmul`: no permutation; every expert computes every token and a mask of weights keeps the K chosen."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

from torch import Tensor

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router

#: Above this many times the FLOPs the cost is said out loud.
_DEAR = 8


class MaskedMatmul(Router):
    """Selects as `naive_topk` does and moves no rows (T_pack is building the (T, E) mask alone).

    The experts cost E / K times the floating-point operations of a permuting router and E * T * F activations: it
    pays for small E, where sorting and gathering cost more than the wasted products.
    """

    movement: ClassVar[Literal["permute", "masked"]] = "masked"

    def __init__(self, d_model: int, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        if num_experts > _DEAR * top_k:
            warnings.warn(
                f"router.masked_matmul: the experts cost num_experts / top_k = {num_experts / top_k:.0f} times the "
                f"FLOPs, got num_experts={num_experts}, top_k={top_k}; a router that permutes is cheaper",
                stacklevel=2,
            )

    def choose(self, logits_TE: Tensor) -> Selection:
        """Torch operators only."""
        return select(logits_TE, self.top_k, implementation="torch")
