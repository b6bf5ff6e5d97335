"""Losses that keep a router healthy: balanced load and small logits. Padding is in none of them.

Legend: T tokens, E experts, K top_k, B sequences of S tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.ops.select import expert_scores
from moe_lightning.routers.base import Routing
from moe_lightning.utils.checks import check_choice


def load_balancing_loss(routing: Routing, scope: Literal["rank", "global"] = "rank") -> Tensor:
    """E * sum_e f_e * p_e; 1 at perfect balance, E when one expert takes all (Switch, arXiv:2101.03961, eq. 4-6).

    f_e is the share of kept slots at expert e (no gradient) and p_e the mean softmax probability of e. Under a capacity
    limit the drop flattens f, so the loss is milder there than Switch's, which counts before the drop.

    Args:
        routing: a layer's logits (T, E) and selection.
        scope: "rank" takes f over this rank's micro-batch; "global" sums the counts of all ranks first
            (arXiv:2501.11873). p is over this rank's tokens in both, and the mean over ranks is left to the
            gradient's own all-reduce.

    Returns:
        fp32 scalar; 0 for T = 0.
    """
    check_choice("router.load_balancing_loss", "scope", scope, ("rank", "global"))
    logits_TE = routing.logits_TE.float()
    load_E = routing.selection.tokens_per_expert_E.float()
    if scope == "global" and dist.is_available() and dist.is_initialized():
        load_E = load_E.clone()
        dist.all_reduce(load_E)
    f_E = load_E / load_E.sum().clamp(min=1)
    p_E = _mean_over_tokens(torch.softmax(logits_TE, -1), routing.tokens.mask_T)
    return logits_TE.shape[1] * (f_E * p_E).sum()


def sequence_balance_loss(routing: Routing, score: str = "sigmoid", top_k: int | None = None) -> Tensor:
    """The mean over sequences of ``sum_e f_e * p_e``, 1 at perfect balance (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    Of a sequence, f_e is E / (K S) times the number of its tokens that have e among their K highest scores (no
    gradient, and no bias), and p_e the mean of the scores of e, each over the sum of its token's.

    Args:
        routing: a layer's logits (T, E) and selection, of sequences of `tokens.seq_len`.
        score: of `ops.select`.
        top_k: K; the columns of the selection if None.

    Returns:
        fp32 scalar; 0 for T = 0.

    Raises:
        ValueError: the routing does not know the length of its sequences.
    """
    seq_len, mask_T = routing.tokens.seq_len, routing.tokens.mask_T
    tokens, experts = routing.logits_TE.shape
    if seq_len is None or tokens % seq_len:
        raise ValueError(
            f"router.sequence_balance_loss: tokens must be of whole sequences, got {tokens} tokens, seq_len={seq_len}; "
            "give the router Tokens(seq_len=...)"
        )
    scores_TE = expert_scores(routing.logits_TE.float(), score)
    shares_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    top_k = top_k or routing.selection.expert_ids_TK.shape[1]
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, scores_TE.detach().topk(top_k, dim=1).indices, 1.0)
    if mask_T is None:
        real_B1 = torch.full((tokens // seq_len, 1), float(seq_len), device=scores_TE.device)
    else:
        shares_TE, chosen_TE = (each.masked_fill(~mask_T[:, None], 0.0) for each in (shares_TE, chosen_TE))
        real_B1 = mask_T.view(-1, seq_len).sum(1, keepdim=True).float()
    f_BE = chosen_TE.view(-1, seq_len, experts).sum(1) * experts / (top_k * real_B1.clamp_min(1))
    p_BE = shares_TE.view(-1, seq_len, experts).sum(1) / real_B1.clamp_min(1)
    return (f_BE * p_BE).sum() / (real_B1 > 0).sum().clamp_min(1)


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the logits, fp32 scalar; 0 for T = 0 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    logits_TE = routing.logits_TE.float()
    return _mean_over_tokens(torch.logsumexp(logits_TE, -1).square(), routing.tokens.mask_T)


def _mean_over_tokens(values: Tensor, mask_T: Tensor | None) -> Tensor:
    """Of values (T, ...); 0 where there are none."""
    if mask_T is None:
        return values.sum(0) / max(values.shape[0], 1)
    real = mask_T.view(-1, *(1,) * (values.dim() - 1))
    return values.masked_fill(~real, 0.0).sum(0) / mask_T.sum().clamp_min(1)
