"""Routers that are balanced without a loss, by a bias of each expert's score that follows the load.

Legend: T tokens, E experts, K top_k, B bins of gaps.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection
from moe_lightning.ops.select import GAP_BINS, expert_scores, gap_edges
from moe_lightning.routers.base import Tokens
from moe_lightning.routers.per_step import UpdatedPerStep, histogram_quantile
from moe_lightning.routers.topk import Score, TopK
from moe_lightning.utils.checks import check_choice, check_fraction, check_positive

Update = Literal["sign", "proportional"]


class BiasBalanced(UpdatedPerStep, TopK):
    """A `topk` with a bias that chooses and makes no weights; it is in checkpoints, and stays in evaluation."""

    bias_E: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, score: Score = "sigmoid", **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        if kwargs.get("score_after_choice"):
            raise ValueError(
                "router: a bias is added to the scores of all experts, got score_after_choice=True; leave it out"
            )
        self.register_buffer("bias_E", torch.zeros(num_experts))

    @override
    def ranking_scores(self, logits_TE: Tensor) -> Tensor:
        return expert_scores(logits_TE, self.score) + self.bias_E

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        return self.select_and_gather(logits_TE, tokens, self.gathering(logits_TE.device))

    @abstractmethod
    def select_and_gather(self, logits_TE: Tensor, tokens: Tokens, gathered: Tensor | None) -> Selection:
        """Select, and add what the pass shows to `gathered`, if that is given."""

    @override
    def update(self, gathered: Tensor) -> None:
        self.bias_E.copy_(self.new_bias(gathered))

    @abstractmethod
    def new_bias(self, gathered: Tensor) -> Tensor:
        """The bias (E) after an optimizer step, from what all ranks have gathered."""


class AuxFree(BiasBalanced):
    """`aux_free`: the bias goes up where an expert has less than its share of the load, and down where it has more.

    Loss-free balancing (arXiv:2408.15664), as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): after each optimizer
    step ``bias_e += bias_rate * sign(mean - load_e)``, with the load of the whole global batch.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts a token is sent to.
        bias_rate: step of the bias; both papers take 0.001.
        bias_update: sign; or proportional, ``bias_rate * (mean - load_e) / mean``.
        score: sigmoid in both papers.
        kwargs: the options of `topk` and of every router.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias_rate: float = 0.001,
        bias_update: Update = "sign",
        score: Score = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        check_positive("router", "bias_rate", bias_rate)
        check_choice("router", "bias_update", bias_update, get_args(Update))
        self.bias_rate, self.bias_update = bias_rate, bias_update

    @property
    @override
    def gathers(self) -> tuple[int, ...]:
        return (self.num_experts,)

    @override
    def select_and_gather(self, logits_TE: Tensor, tokens: Tokens, gathered: Tensor | None) -> Selection:
        selection = self._select(logits_TE, tokens, bias_E=self.bias_E.float())
        if gathered is not None:
            gathered += selection.tokens_per_expert_E
        return selection

    @override
    def new_bias(self, gathered: Tensor) -> Tensor:
        error_E = gathered.mean() - gathered
        if self.bias_update == "sign":
            return self.bias_E + self.bias_rate * error_E.sign()
        return self.bias_E + self.bias_rate * error_E / gathered.mean().clamp(min=1.0)


class Quantile(BiasBalanced):
    """`quantile`: the bias at which each expert would have had its share of the tokens seen; no rate to tune.

    Quantile balancing (Kimi K3's report, section 2.3.3 and appendix D; https://kexue.fm/archives/11619). A token takes
    an expert if its score and bias are above the (K + 1)-th best of the token's: if the gap, the difference, is
    negative. So after each optimizer step the K / E quantile of its gaps over the global batch is added to the bias of
    each expert, and the mean of all biases taken off. The selecting kernel counts the gaps, in bins that are as narrow
    as 0.002 at 0 and widen with the distance, where the report has 1,000 of equal width (`ops.select`).

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts; with top_k of them there is nothing to balance.
        top_k: K, the experts a token is sent to.
        bias_decay: share of the old bias in the new one; 0 as in the report.
        score: sigmoid in the report.
        kwargs: the options of `topk` and of every router.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias_decay: float = 0.0,
        score: Score = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        check_fraction("router", "bias_decay", bias_decay)
        if self.topk_group < self.n_group:
            raise ValueError(
                f"router: quantile has no groups, whose cutoffs are not a token's, got n_group={self.n_group}, "
                f"topk_group={self.topk_group}; leave them at 1"
            )
        self.bias_decay = bias_decay

    @property
    @override
    def gathers(self) -> tuple[int, ...]:
        return (GAP_BINS, self.num_experts)

    @override
    def select_and_gather(self, logits_TE: Tensor, tokens: Tokens, gathered: Tensor | None) -> Selection:
        gap_counts_BE = None if self.top_k == self.num_experts else gathered
        return self._select(logits_TE, tokens, bias_E=self.bias_E.float(), gap_counts_BE=gap_counts_BE)

    @override
    def new_bias(self, gathered: Tensor) -> Tensor:
        share = self.top_k / self.num_experts
        new_E = self.bias_E + histogram_quantile(gathered.T, share, gap_edges(gathered.device))
        new_E = self.bias_decay * self.bias_E + (1 - self.bias_decay) * (new_E - new_E.mean())
        return torch.where(gathered.sum(0) > 0, new_E, self.bias_E)
