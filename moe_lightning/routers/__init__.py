"""Routers: which experts a token goes to, and with what weights."""

from moe_lightning.routers.balancing import AuxFree, BiasBalanced, Quantile
from moe_lightning.routers.base import NO_TOKENS, Router, Routing, Tokens
from moe_lightning.routers.expert_choice import ExpertChoice, ExpertThreshold
from moe_lightning.routers.fixed import FrozenRandom, Hash
from moe_lightning.routers.losses import load_balancing_loss, sequence_balance_loss, z_loss
from moe_lightning.routers.per_step import UpdatedPerStep, update_biases
from moe_lightning.routers.registry import ROUTERS, router_class, router_name
from moe_lightning.routers.sinkhorn import Sinkhorn
from moe_lightning.routers.topk import FusedSelect, MaskedMatmul, NaiveTopK, TopK

__all__ = [
    "NO_TOKENS",
    "ROUTERS",
    "AuxFree",
    "BiasBalanced",
    "ExpertChoice",
    "ExpertThreshold",
    "FrozenRandom",
    "FusedSelect",
    "Hash",
    "MaskedMatmul",
    "NaiveTopK",
    "Quantile",
    "Router",
    "Routing",
    "Sinkhorn",
    "Tokens",
    "TopK",
    "UpdatedPerStep",
    "load_balancing_loss",
    "router_class",
    "router_name",
    "sequence_balance_loss",
    "update_biases",
    "z_loss",
]
