"""Routers: which experts a token goes to, and with what weights."""

from moe_lightning.routers.base import Router, Routing
from moe_lightning.routers.losses import load_balancing_loss, z_loss
from moe_lightning.routers.registry import ROUTERS, router_class, router_name
from moe_lightning.routers.sinkhorn import Sinkhorn
from moe_lightning.routers.topk import FusedSelect, MaskedMatmul, NaiveTopK

__all__ = [
    "ROUTERS",
    "FusedSelect",
    "MaskedMatmul",
    "NaiveTopK",
    "Router",
    "Routing",
    "Sinkhorn",
    "load_balancing_loss",
    "router_class",
    "router_name",
    "z_loss",
]
