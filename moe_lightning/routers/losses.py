"""Losses that keep a router healthy: balanced load and small logits.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

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
    p_E = torch.softmax(logits_TE, -1).sum(0) / max(logits_TE.shape[0], 1)
    return logits_TE.shape[1] * (f_E * p_E).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the logits, fp32 scalar; 0 for T = 0 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    logits_TE = routing.logits_TE.float()
    return torch.logsumexp(logits_TE, -1).square().sum() / max(logits_TE.shape[0], 1)
