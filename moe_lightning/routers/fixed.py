"""Routers that do not learn: the baselines that tell what a learned one is worth.

Legend: T tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.ops import Selection, select
from moe_lightning.routers.base import Router, Tokens, order_of
from moe_lightning.routers.topk import TopK
from moe_lightning.utils.checks import check_int

# A multiplicative hash of 31 bits: odd factors, and shifts that bring high bits down.
_FACTORS = (0x45D9F3B, 0x119DE1F3)
_BITS = 31
_SEED_STEP = 0x9E3779B1


class FrozenRandom(TopK):
    """`frozen_random`: `topk` of a gate that stays as it was drawn (arXiv:2402.13089 compares it with a learned one).

    Arguments as of `topk`.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        self.requires_grad_(False)


class Hash(Router):
    """`hash`: a token of the vocabulary always takes the same K experts, drawn at random (arXiv:2106.04426).

    Weights are 1 / K and nothing is learnt. Where no token ids are given, positions in the batch stand in for them.

    Args:
        d_model: width D of a token.
        num_experts: E, the number of experts.
        top_k: K, the experts a token is sent to.
        hash_seed: draws another assignment.
        kwargs: the options of every router, see `Router`; a bias or skew of logits has no effect.
    """

    needs_token_ids: ClassVar[bool] = True

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, hash_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **kwargs)
        check_int("router", "hash_seed", hash_seed, 0)
        self.hash_seed = hash_seed
        self.requires_grad_(False)

    @override
    def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
        device = logits_TE.device
        ids_T = torch.arange(logits_TE.shape[0], device=device) if tokens.ids_T is None else tokens.ids_T.long()
        rows_T1 = _hash(ids_T + self.hash_seed * _SEED_STEP)[:, None]
        scores_TE = _hash(rows_T1 + torch.arange(self.num_experts, device=device)).float()
        return self._choose(logits_TE, scores_TE, tokens)

    @override
    def select_given(self, logits_TE: Tensor, ids_TK: Tensor, tokens: Tokens) -> Selection:
        return self._choose(logits_TE, order_of(ids_TK, self.num_experts), tokens)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, tokens: Tokens) -> Selection:
        equal_TE = logits_TE.masked_fill(logits_TE.isfinite(), 0.0)  # a mask stays, and NaN and +inf show
        return select(equal_TE, self.top_k, scores_TE=scores_TE, mask_T=tokens.mask_T)


def _hash(keys: Tensor) -> Tensor:
    mask = (1 << _BITS) - 1
    for factor in _FACTORS:
        keys = ((keys ^ (keys >> 15)) * factor) & mask
    return keys ^ (keys >> 16)
