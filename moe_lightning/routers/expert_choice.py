"""Routers under which each expert takes tokens, so that the number of a token's experts varies: K on average.

A selection has `max_experts_per_token` columns, M. Slots that a token does not use are dropped ones: id -1, weight 0.

Legend: T tokens, E experts, K top_k, M columns, B bins of a histogram.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection
from moe_lightning.ops.library import accum_dtype
from moe_lightning.ops.select import expert_scores
from moe_lightning.routers.base import Router, Tokens
from moe_lightning.routers.per_step import UpdatedPerStep, histogram_quantile
from moe_lightning.utils.checks import check_choice, check_fraction

Score = Literal["softmax", "sigmoid"]

#: Bins of the histogram of `expert_threshold`, and where it ends, in log-odds of a score.
BINS = 1000
_LOG_ODDS = 16.0


class ExpertTakes(Router):
    """A router whose experts take tokens, each by itself.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts of a token on average.
        score: softmax over the experts, or sigmoid of each. The weights are the scores.
        max_experts_per_token: M; of the experts that took a token those with the highest scores are kept. By default
            min(E, 2 K). Memory grows with it: T * M rows are reserved for the experts, since how many are used is known
            on the device alone; only those are computed.
        kwargs: the options of every router, see `Router`.

    Raises:
        ValueError: an option is out of range.
    """

    may_drop: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score,
        max_experts_per_token: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        check_choice("router", "score", score, get_args(Score))
        most = min(num_experts, 2 * top_k) if max_experts_per_token is None else max_experts_per_token
        if not top_k <= most <= num_experts:
            raise ValueError(
                f"router: max_experts_per_token must be in [top_k, num_experts], got max_experts_per_token={most}, "
                f"top_k={top_k}, num_experts={num_experts}"
            )
        self.score, self.max_experts_per_token = score, most

    @property
    @override
    def slots(self) -> int:
        return self.max_experts_per_token

    @override
    def ranking_scores(self, logits_TE: Tensor) -> Tensor:
        return expert_scores(logits_TE, self.score)

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        mask_T = tokens.mask_T
        with torch.no_grad():
            bad_T = (logits_TE.isnan() | (logits_TE == torch.inf)).any(1)
            bad_T |= (logits_TE > -torch.inf).sum(1) < self.top_k
            free_TE = (logits_TE > -torch.inf) & ~bad_T[:, None]
            if mask_T is not None:
                free_TE, bad_T = free_TE & mask_T[:, None], bad_T & mask_T
        # Added, not filled in, so that the gradient of an invalid row is NaN as well.
        wide_TE = logits_TE.to(accum_dtype(logits_TE.dtype)) + torch.where(bad_T, torch.nan, 0.0)[:, None]
        scores_TE = expert_scores(wide_TE, self.score)
        with torch.no_grad():
            taken_TE, most = self.take(scores_TE, free_TE, mask_T)
            keys_TE = torch.where(taken_TE, scores_TE, -1.0)
            # An invalid row has any K experts: its weights are what shows it.
            ids_TM = keys_TE.nan_to_num(-1.0).sort(dim=1, descending=True, stable=True).indices[:, : self.slots]
            column_M = torch.arange(self.slots, device=ids_TM.device)
            kept_TM = (taken_TE.gather(1, ids_TM) & (column_M < most)) | (bad_T[:, None] & (column_M < self.top_k))
        weights_TM = torch.where(kept_TM, scores_TE.gather(1, ids_TM), 0.0)
        return selection_of(weights_TM, ids_TM, kept_TM, self.num_experts, bad_T)

    @abstractmethod
    def take(self, scores_TE: Tensor, free_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, int | Tensor]:
        """Which tokens each expert takes of those that are free (T, E), and how many experts a token keeps at most."""


def selection_of(weights_TM: Tensor, ids_TM: Tensor, kept_TM: Tensor, num_experts: int, bad_T: Tensor) -> Selection:
    """With all slots dropped but those that are kept."""
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=ids_TM.device)
    counts_E = counts_E.scatter_add(0, ids_TM.flatten(), kept_TM.flatten().int())
    return Selection(weights_TM, ids_TM.int().masked_fill(~kept_TM, -1), counts_E, bad_T.sum(dtype=torch.int32))


class ExpertChoice(ExpertTakes):
    """`expert_choice`: each expert takes the ceil(T K / E) tokens with the highest scores (arXiv:2202.09368).

    **A study of training, not of language models in use.** Whether an expert takes a token depends on the other tokens
    of the batch, those behind it too: the model sees the future, and its outputs change with their neighbours, in
    evaluation as well. So a validation loss is not comparable with that of another router. `expert_threshold` is the
    causal router of the same kind.

    The load is even by construction, but for what `max_experts_per_token` cuts off (the paper's EC-CAP, whose linear
    program finds other tokens for the slots that are lost; here they stay empty). Of equal scores the lower token is
    taken. T is of one rank's micro-batch, without padding, which is never taken. A token may have no expert.

    Arguments as of `ExpertTakes`; the paper's score is softmax.
    """

    looks_ahead: ClassVar[bool] = True

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, score: Score = "softmax", **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        warnings.warn(
            "router: expert_choice looks at the tokens that follow, and a token's experts depend on its batch: losses, "
            "validation too, are not comparable with those of other routers; expert_threshold is causal",
            stacklevel=2,
        )

    @override
    def take(self, scores_TE: Tensor, free_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, int | Tensor]:
        tokens, experts = scores_TE.shape
        real = tokens if mask_T is None else mask_T.sum()
        capacity = (real * self.top_k + experts - 1) // experts
        keys_TE = torch.where(free_TE, scores_TE, -1.0)
        order_TE = keys_TE.sort(dim=0, descending=True, stable=True).indices
        place_T1 = torch.arange(tokens, device=order_TE.device)[:, None]
        place_TE = torch.zeros_like(order_TE).scatter(0, order_TE, place_T1.expand(tokens, experts))
        return free_TE & (place_TE < capacity), self.slots


class ExpertThreshold(UpdatedPerStep, ExpertTakes):
    """`expert_threshold`: each expert takes every token whose score is above the expert's threshold (arXiv:2603.11535).

    Causal: a token's experts depend on itself alone, in training and in evaluation. The threshold of an expert follows
    the score above which K / E of all tokens are: after each optimizer step it moves towards that quantile of the
    global batch, read from a histogram of the log-odds of the scores. So the load is even on average, without a loss.
    It is a buffer, in checkpoints, and stays in evaluation. Until it is updated for the first time, a token has its K
    best experts, as under `topk`; the first quantile is taken as it is.

    A token may have no expert: this layer then adds nothing to it. Shared experts, which all tokens have, go well with
    that.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts of a token on average.
        threshold_decay: share of the old threshold in the new one.
        score: as of `ExpertTakes`.
        kwargs: `max_experts_per_token` of `ExpertTakes`, and the options of every router.
    """

    threshold_E: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        threshold_decay: float = 0.9,
        score: Score = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        check_fraction("router", "threshold_decay", threshold_decay)
        self.threshold_decay = threshold_decay
        #: Negative: not known yet.
        self.register_buffer("threshold_E", torch.full((num_experts,), -1.0))

    @override
    def cutoffs(self) -> Tensor | None:
        return self.threshold_E.float()

    @override
    def take(self, scores_TE: Tensor, free_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, int | Tensor]:
        if self.top_k == self.num_experts:
            return free_TE, self.slots
        threshold_E = self.threshold_E.float()
        most = torch.where((threshold_E < 0).any(), self.top_k, self.slots)
        return free_TE & (scores_TE > threshold_E), most

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        gathered = self.gathering(logits_TE.device)
        if gathered is not None:
            gathered += self._histogram(logits_TE.detach(), tokens.mask_T)
        return super().select_experts(logits_TE, tokens)

    @property
    @override
    def gathers(self) -> tuple[int, ...]:
        return self.num_experts, BINS

    @torch.no_grad()
    def _histogram(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """Tokens by expert and the log-odds of its score (E, B), fp32."""
        scores_TE = expert_scores(logits_TE, self.score).float()
        real_T = ~scores_TE.isnan().any(1)
        if mask_T is not None:
            real_T = real_T & mask_T
        odds_TE = scores_TE.logit().nan_to_num().clamp(-_LOG_ODDS, _LOG_ODDS)
        bins_TE = ((odds_TE + _LOG_ODDS) * (BINS / (2 * _LOG_ODDS))).long().clamp(0, BINS - 1)
        each_TE = real_T[:, None].float().expand_as(scores_TE)
        return torch.zeros(self.num_experts, BINS, device=logits_TE.device).scatter_add_(1, bins_TE.T, each_TE.T)

    @override
    def update(self, gathered: Tensor) -> None:
        edges = torch.linspace(-_LOG_ODDS, _LOG_ODDS, BINS + 1, device=gathered.device)
        new_E = histogram_quantile(gathered, 1 - self.top_k / self.num_experts, edges).sigmoid()
        old_E = self.threshold_E.float()
        kept_E = torch.where(old_E < 0, new_E, self.threshold_decay * old_E + (1 - self.threshold_decay) * new_E)
        self.threshold_E.copy_(torch.where(gathered.sum(1) > 0, kept_E, old_E))
