"""The K experts with the highest scores: `topk` in full, and the original's three routers as presets of it.

Legend: T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection, select
from moe_lightning.ops.select import SCORES, check_groups, expert_scores
from moe_lightning.routers.base import Router, Tokens, order_of
from moe_lightning.utils.checks import check_choice

#: A warning is given where the experts take more than this many times the FLOPs.
_FLOP_RATIO_WARNING = 8

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


class TopK(Router):
    """`topk`: the K highest scores, and weights made of these, as today's models have them.

    | | score | renormalize | others |
    |---|---|---|---|
    | Mixtral (arXiv:2401.04088), gpt-oss | softmax | yes | gate_bias |
    | OLMoE (arXiv:2409.02060) | softmax | no | |
    | Qwen3-MoE (arXiv:2505.09388) | softmax | yes | |
    | DeepSeek-V2 (arXiv:2405.04434) | softmax | no | groups, scaling_factor |
    | DeepSeek-V3 (arXiv:2412.19437) | sigmoid | yes | groups, scaling_factor, and the bias of `aux_free` |
    | Llama-4 | sigmoid | no | top_k 1 |

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts a token is sent to.
        score: softmax over the experts, sigmoid of each, or sqrtsoftplus, the root of log(1 + exp(logit)).
        score_after_choice: choose by the logits, then take the score of the chosen alone; of a softmax that is what
            `renormalize` gives.
        renormalize: weights of a token sum to 1, before `scaling_factor`.
        scaling_factor: of the weights (routed_scaling_factor of DeepSeek).
        n_group: groups of neighbouring experts; a token's come from `topk_group` of them, ranked by the sum of the
            scores of their two best experts.
        topk_group: groups of a token.
        kwargs: the options of every router, see `Router`.

    Raises:
        ValueError: an option is out of range, or does not go with another.
    """

    #: Of `ops.select`: "torch", or "auto": native, and where the module for a device is missing torch, with a warning.
    implementation: ClassVar[Literal["auto", "torch"]] = "auto"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score = "softmax",
        score_after_choice: bool = False,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        check_choice("router", "score", score, SCORES)
        if not (math.isfinite(scaling_factor) and scaling_factor > 0):
            raise ValueError(f"router: scaling_factor must be positive and finite, got scaling_factor={scaling_factor}")
        check_groups("router", num_experts, top_k, n_group, topk_group)
        if score_after_choice and topk_group < n_group:
            raise ValueError(
                f"router: groups are ranked by scores, which score_after_choice leaves to the chosen, got "
                f"n_group={n_group}, score_after_choice=True; leave one of them out"
            )
        if top_k == 1 and renormalize and num_experts > 1:
            warnings.warn(
                f"router: with top_k=1 a renormalised weight is always 1, so the gate learns from the balancing losses "
                f"alone, got score={score}; renormalize: false lets it learn from the task",
                stacklevel=2,
            )
        self.score, self.scaling_factor = score, scaling_factor
        self.renormalize = renormalize or (score_after_choice and score == "softmax")
        self.n_group, self.topk_group = n_group, topk_group

    @override
    def ranking_scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE if self.topk_group == self.n_group else expert_scores(logits_TE, self.score)

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        return self._select(logits_TE, tokens)

    @override
    def select_given(self, logits_TE: Tensor, ids_TK: Tensor, tokens: Tokens) -> Selection:
        return self._select(logits_TE, tokens, n_group=1, topk_group=1, scores_TE=order_of(ids_TK, self.num_experts))

    def _select(self, logits_TE: Tensor, tokens: Tokens, **options: Any) -> Selection:
        return select(
            logits_TE,
            self.top_k,
            self.implementation,
            score=self.score,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
            mask_T=tokens.mask_T,
            **{"n_group": self.n_group, "topk_group": self.topk_group, **options},
        )


class NaiveTopK(TopK):
    """`naive_topk`: `topk` as one writes it in plain torch, and the reference for all others."""

    implementation = "torch"


class FusedSelect(TopK):
    """`fused_select`: `topk` by our kernels, in one native pass over the logits.

    The ids of `naive_topk` exactly and its weights within fp32 rounding.
    """


class MaskedMatmul(TopK):
    """`masked_matmul`: no permutation; every expert computes every token and a mask of weights keeps the K chosen.

    T_pack is making the (T, E) mask alone. The experts cost E / K times the FLOPs of a permuting router and E * T * F
    activations: it pays for small E, where sorting and gathering cost more than the wasted products.
    """

    implementation = "torch"
    dispatch_mode: ClassVar[Literal["permute", "masked"]] = "masked"

    def __init__(self, d_model: int, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        if num_experts > _FLOP_RATIO_WARNING * top_k:
            warnings.warn(
                f"router.masked_matmul: the experts cost num_experts / top_k = {num_experts / top_k:.0f} times the "
                f"FLOPs, got num_experts={num_experts}, top_k={top_k}; a router that permutes is cheaper",
                stacklevel=2,
            )
