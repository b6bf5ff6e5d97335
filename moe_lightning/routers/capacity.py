"""Expert capacity: a full expert keeps its heaviest slots and drops the rest.

GShard (arXiv:2006.16668) and Switch (arXiv:2101.03961) drop by position in the batch; dropping the lightest, as
V-MoE's batch-prioritised routing does (arXiv:2106.05974), loses less.
"""

from __future__ import annotations

import math

import torch

from moe_lightning.ops import Selection


def drop_over_capacity(selection: Selection, capacity_factor: float) -> Selection:
    """Mark slots beyond ceil(capacity_factor * T * K / E) of an expert as dropped (id -1, weight 0).

    The order within an expert is weight descending, then slot ascending. `tokens_per_expert_E` becomes the load
    after the drop. Weights are not renormalised. Deterministic, no host synchronisation.
    """
    tokens, top_k = selection.expert_ids_TK.shape
    num_experts = selection.tokens_per_expert_E.numel()
    # An expert never gets more than one slot a token; the bound also keeps a huge factor an int. The last digits of
    # a float product do not make a slot.
    capacity = math.ceil(min(capacity_factor * top_k / num_experts, 1.0) * tokens - 1e-6)
    ids_N = selection.expert_ids_TK.flatten().long()

    by_weight_N = selection.weights_TK.detach().flatten().argsort(descending=True, stable=True)
    by_expert_N = by_weight_N[ids_N[by_weight_N].argsort(stable=True)]
    load_E = selection.tokens_per_expert_E.long()
    first_E = load_E.cumsum(0) - load_E
    rank_N = torch.empty_like(ids_N)
    rank_N[by_expert_N] = torch.arange(ids_N.numel(), device=ids_N.device) - first_E[ids_N[by_expert_N]]

    kept_TK = (rank_N < capacity).view(tokens, top_k)
    return Selection(
        weights_TK=selection.weights_TK.masked_fill(~kept_TK, 0.0),
        expert_ids_TK=selection.expert_ids_TK.masked_fill(~kept_TK, -1),
        tokens_per_expert_E=selection.tokens_per_expert_E.clamp(max=capacity),
        invalid_rows=selection.invalid_rows,
    )
