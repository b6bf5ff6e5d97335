"""Routers that are balanced without a loss, by a bias of each expert's score that follows the load.

What a bias follows is gathered in forward passes and goes into it once per optimizer step, over all micro-batches and
ranks: `update_biases` does that, and the optimizer of a `LanguageModule` calls it after each step.

Legend: T tokens, E experts, K top_k, B bins of a histogram.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.ops import Selection
from moe_lightning.ops.select import expert_scores, of_real_tokens
from moe_lightning.routers.base import Tokens
from moe_lightning.routers.topk import Score, TopK
from moe_lightning.utils.checks import check_choice, check_fraction, check_positive

Update = Literal["sign", "proportional"]

#: Of the histogram of `quantile`.
BINS = 1000


class BiasBalanced(TopK):
    """A `topk` with a bias that chooses and makes no weights; it is in checkpoints, and stays in evaluation."""

    bias_E: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, score: Score = "sigmoid", **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, score=score, **kwargs)
        if kwargs.get("score_after_choice"):
            raise ValueError(
                "router: a bias is added to the scores of all experts, got score_after_choice=True; leave it out"
            )
        self.register_buffer("bias_E", torch.zeros(num_experts))
        #: What the bias follows, of the passes since it was updated. No buffer: those are made equal on all ranks.
        self.gathered: Tensor | None = None

    @override
    def ranking_scores(self, logits_TE: Tensor) -> Tensor:
        return expert_scores(logits_TE, self.score) + self.bias_E

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        selection = self._select(logits_TE, self.bias_E.float())
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self._add(self.gather(logits_TE.detach(), selection, tokens.mask_T))
        return selection

    def _add(self, new: Tensor) -> None:
        if self.gathered is None or self.gathered.device != new.device:
            self.gathered = torch.zeros_like(new)
        self.gathered += new  # in place: a CUDA graph writes to it

    @abstractmethod
    def gather(self, logits_TE: Tensor, selection: Selection, mask_T: Tensor | None) -> Tensor:
        """What this pass adds to `gathered`, fp32."""

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

    @override
    def gather(self, logits_TE: Tensor, selection: Selection, mask_T: Tensor | None) -> Tensor:
        if mask_T is not None:
            selection = of_real_tokens(selection, mask_T)
        return selection.tokens_per_expert_E.float()

    @override
    def new_bias(self, gathered: Tensor) -> Tensor:
        error_E = gathered.mean() - gathered
        if self.bias_update == "sign":
            return self.bias_E + self.bias_rate * error_E.sign()
        return self.bias_E + self.bias_rate * error_E / gathered.mean().clamp(min=1.0)


class Quantile(BiasBalanced):
    """`quantile`: the bias at which each expert would have had its share of the tokens that were seen; no rate to tune.

    Quantile balancing (Kimi K3's report, section 2.3.3 and appendix D; https://kexue.fm/archives/11619). A token takes
    expert e if its score and bias are above the (K + 1)-th best of the token's, the cutoff: if ``bias_e > cutoff -
    score_e``. So after each optimizer step the bias is the K / E quantile of these differences over the global batch,
    read from a histogram of `BINS` bins, less the mean of all biases.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts; with top_k of them there is nothing to balance.
        top_k: K, the experts a token is sent to.
        bias_decay: share of the old bias in the new one; 0 as in the report.
        score: sigmoid or softmax, whose values are in [0, 1].
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
        if score == "sqrtsoftplus":
            raise ValueError("router: quantile needs scores in [0, 1], got score=sqrtsoftplus; take sigmoid or softmax")
        if self.topk_group < self.n_group:
            raise ValueError(
                f"router: quantile has no groups, whose cutoffs are not a token's, got n_group={self.n_group}, "
                f"topk_group={self.topk_group}; leave them at 1"
            )
        self.bias_decay = bias_decay

    @override
    def gather(self, logits_TE: Tensor, selection: Selection, mask_T: Tensor | None) -> Tensor:
        """A histogram (E, B) of the biases that would just have let each expert take each token."""
        counts_EB = torch.zeros(self.num_experts, BINS, device=logits_TE.device)
        if self.top_k == self.num_experts:
            return counts_EB
        scores_TE = expert_scores(logits_TE, self.score).float()
        cutoff_T1 = (scores_TE + self.bias_E).topk(self.top_k + 1, dim=1).values[:, -1:]
        low, width = self._range()
        bins_TE = ((cutoff_T1 - scores_TE - low) / width).nan_to_num().long().clamp(0, BINS - 1)
        ones_TE = torch.ones_like(scores_TE)
        if mask_T is not None:
            ones_TE = ones_TE.masked_fill(~mask_T[:, None], 0.0)
        return counts_EB.scatter_add_(1, bins_TE.T, ones_TE.T)

    @override
    def new_bias(self, gathered: Tensor) -> Tensor:
        """At the quantile, within its bin by interpolation."""
        below_EB = gathered.cumsum(1)
        tokens_E1 = below_EB[:, -1:]
        target_E1 = tokens_E1 * (self.top_k / self.num_experts)
        bin_E1 = torch.searchsorted(below_EB, target_E1).clamp(max=BINS - 1)
        inside_E1 = gathered.gather(1, bin_E1)
        before_E1 = below_EB.gather(1, bin_E1) - inside_E1
        low, width = self._range()
        bias_E = low + width * (bin_E1 + (target_E1 - before_E1) / inside_E1.clamp(min=1.0)).squeeze(1)
        bias_E = self.bias_decay * self.bias_E + (1 - self.bias_decay) * (bias_E - bias_E.mean())
        return torch.where(tokens_E1.squeeze(1) > 0, bias_E, self.bias_E)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Where the bins begin, and how wide one is: with scores in [0, 1] no difference is outside."""
        low, high = self.bias_E.min() - 1.0, self.bias_E.max() + 1.0
        return low, (high - low) / BINS


@torch.no_grad()
def update_biases(module: nn.Module) -> None:
    """Bring the biases of all routers in a module up to date with what all ranks have gathered, once per step.

    Equal on all ranks, and without waiting for the device. A collective where ranks are joined: all must call it.
    """
    routers = [part for part in module.modules() if isinstance(part, BiasBalanced) and part.gathered is not None]
    if not routers:
        return
    gathered = [router.gathered for router in routers if router.gathered is not None]
    if dist.is_available() and dist.is_initialized():
        flat = torch.cat([one.flatten() for one in gathered])
        dist.all_reduce(flat)
        parts = flat.split([one.numel() for one in gathered])
        totals = [part.view_as(one) for part, one in zip(parts, gathered, strict=True)]
    else:
        totals = gathered
    for router, total, own in zip(routers, totals, gathered, strict=True):
        router.bias_E.copy_(router.new_bias(total))
        own.zero_()
