"""`sinkhorn`: balanced assignment while training, plain top-k in evaluation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection, check_sinkhorn_arguments, select, sinkhorn
from moe_lightning.routers.base import Router, Tokens


class Sinkhorn(Router):
    """Chooses on doubly normalised scores, so that experts get near-equal load without a balancing loss.

    Sinkhorn and Knopp (1967) in the log domain with a fixed number of iterations; as a router: S-BASE (Clark et al.,
    arXiv:2202.01169). The balance is over the tokens of one rank's micro-batch. Only ids come from the balanced
    scores; the weights are the softmax over the selected raw logits, so gradients are those of top-k. In evaluation
    a token's experts must not depend on its neighbours, hence plain top-k there.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts a token is sent to.
        iterations: row-and-column normalisations.
        temperature: divides the logits before the normalisation; smaller is closer to the raw logits.
        tolerance: stop earlier, once every expert is within this fraction of its share; 0: take all iterations.
        kwargs: the options of every router, see `Router`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        iterations: int = 10,
        temperature: float = 1.0,
        tolerance: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_sinkhorn_arguments("router.sinkhorn", iterations, temperature, tolerance)
        super().__init__(d_model, num_experts, top_k, **kwargs)
        self.iterations = iterations
        self.temperature = temperature
        self.tolerance = tolerance

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        if not self.training:
            return select(logits_TE, self.top_k, mask_T=tokens.mask_T)
        scores_TE = sinkhorn(logits_TE, self.iterations, self.temperature, self.tolerance)
        return select(logits_TE, self.top_k, scores_TE=scores_TE, mask_T=tokens.mask_T)
