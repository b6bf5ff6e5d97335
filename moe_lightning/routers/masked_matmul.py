"""`masked_matmul`: no permutation; every expert computes every token and a mask of weights keeps the K chosen."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router


class MaskedMatmul(Router):
    """Selects as `naive_topk` does and moves no rows (T_pack is building the (T, E) mask alone).

    The experts cost E / K times the floating-point operations of a permuting router and E * T * F activations: it
    pays for small E, where sorting and gathering cost more than the wasted products.
    """

    movement: ClassVar[Literal["permute", "masked"]] = "masked"

    def choose(self, logits_TE: Tensor) -> Selection:
        """Torch operators only."""
        return select(logits_TE, self.top_k, implementation="torch")
