"""`fused_select`: top-k, softmax and the load count in one native pass over the logits."""

from __future__ import annotations

from torch import Tensor

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router


class FusedSelect(Router):
    """The ids of `naive_topk` exactly and its weights within fp32 rounding, by the project's own kernels.

    Where the native module for a device is missing, the torch reference runs and one warning says so.
    """

    def choose(self, logits_TE: Tensor) -> Selection:
        """Native kernels, forward and backward."""
        return select(logits_TE, self.top_k)
