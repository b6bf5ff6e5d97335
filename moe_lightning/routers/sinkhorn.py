"""`sinkhorn`: balanced assignment while training, plain top-k in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection, check_sinkhorn_arguments, select, sinkhorn
from moe_lightning.routers.base import Router, Tokens, order_of

#: From which the potentials are read, each of which says them all; and what no potential is.
_ROWS, _HUGE = 64, 1e30


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
        warm_start: begin where the last pass ended, at its columns' potentials: batches are alike, and fewer iterations
            balance as well. The potentials are of a rank, and in checkpoints.
        kwargs: the options of every router, see `Router`.
    """

    potential_E: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        iterations: int = 10,
        temperature: float = 1.0,
        tolerance: float = 0.0,
        warm_start: bool = False,
        **kwargs: Any,
    ) -> None:
        check_sinkhorn_arguments("router.sinkhorn", iterations, temperature, tolerance)
        super().__init__(d_model, num_experts, top_k, **kwargs)
        self.iterations = iterations
        self.temperature = temperature
        self.tolerance = tolerance

        self.warm_start = warm_start
        if warm_start:
            self.register_buffer("potential_E", torch.zeros(num_experts))

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        mask_T = tokens.mask_T
        if not self.training:
            return select(logits_TE, self.top_k, mask_T=mask_T)
        # Padding neither balances nor is balanced: a row of -inf alone takes part in nothing.
        real_TE = logits_TE.detach() if mask_T is None else logits_TE.detach().masked_fill(~mask_T[:, None], -torch.inf)
        if self.warm_start:  # potentials are of logits over the temperature; what is added to a column is part of it
            real_TE = real_TE.float() + self.temperature * self.potential_E.float()
        scores_TE = sinkhorn(real_TE, self.iterations, self.temperature, self.tolerance)
        if self.warm_start and torch.is_grad_enabled():
            self._keep_potentials(scores_TE, logits_TE)
        if mask_T is not None:
            scores_TE = torch.where(mask_T[:, None], scores_TE, logits_TE.detach().float())
        return select(logits_TE, self.top_k, scores_TE=scores_TE, mask_T=mask_T)

    @override
    def select_given(self, logits_TE: Tensor, ids_TK: Tensor, tokens: Tokens) -> Selection:
        return select(logits_TE, self.top_k, scores_TE=order_of(ids_TK, self.num_experts), mask_T=tokens.mask_T)

    @torch.no_grad()
    def _keep_potentials(self, scores_TE: Tensor, logits_TE: Tensor) -> None:
        """A row of scores is its logits over the temperature, and the potentials, but for a number of the row."""
        added_TE = scores_TE[:_ROWS] - logits_TE[:_ROWS].float() / self.temperature
        whole_T = (added_TE.abs() < _HUGE).all(1)  # no mask, no NaN
        added_TE = (added_TE - added_TE.mean(1, keepdim=True)).masked_fill(~whole_T[:, None], 0.0)
        new_E = added_TE.sum(0) / whole_T.sum().clamp(min=1)
        self.potential_E.copy_(torch.where(whole_T.any(), new_E, self.potential_E.float()))
