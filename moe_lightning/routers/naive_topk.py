"""`naive_topk`: the router as one writes it in plain torch, and the reference for all others."""

from __future__ import annotations

from torch import Tensor

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router


class NaiveTopK(Router):
    """Stable sort, then softmax over the K selected logits, as in Mixtral (arXiv:2401.04088, section 2.1)."""

    def choose(self, logits_TE: Tensor) -> Selection:
        """Torch operators only."""
        return select(logits_TE, self.top_k, implementation="torch")
