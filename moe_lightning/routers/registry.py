"""Names of the routers: one line adds one to the command line, the benchmarks and the tests."""

from __future__ import annotations

from moe_lightning.routers.balancing import AuxFree, Quantile
from moe_lightning.routers.base import Router
from moe_lightning.routers.expert_choice import ExpertChoice, ExpertThreshold
from moe_lightning.routers.fixed import FrozenRandom, Hash
from moe_lightning.routers.sinkhorn import Sinkhorn
from moe_lightning.routers.topk import FusedSelect, MaskedMatmul, NaiveTopK, TopK
from moe_lightning.utils.checks import check_choice

ROUTERS: dict[str, type[Router]] = {
    "naive_topk": NaiveTopK,
    "masked_matmul": MaskedMatmul,
    "fused_select": FusedSelect,
    "sinkhorn": Sinkhorn,
    "topk": TopK,
    "aux_free": AuxFree,
    "quantile": Quantile,
    "frozen_random": FrozenRandom,
    "hash": Hash,
    "expert_choice": ExpertChoice,
    "expert_threshold": ExpertThreshold,
}


def router_class(name: str) -> type[Router]:
    """Look a router up by its name; the error for an unknown one offers the near matches."""
    check_choice("router", "name", name, ROUTERS)
    return ROUTERS[name]


def router_name(router: Router) -> str:
    """The name a router goes by, or its class's for one that is not registered."""
    return next((name for name, kind in ROUTERS.items() if kind is type(router)), type(router).__name__)
