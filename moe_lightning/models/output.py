"""What a language model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_lightning.routers import Routing


class LMOutput(NamedTuple):
    """Next-token logits (B, S, V), and the routing of each MoE layer in order (empty for a dense model)."""

    logits_BSV: Tensor
    routings: tuple[Routing, ...] = ()
