"""The layers that are measured beside each other: one set of weights, one batch, unless they differ by intent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lightning.bench.accounting import Ceilings, Shape
from moe_lightning.bench.layer.peers import PEERS
from moe_lightning.bench.router.case import Case, build_case, build_cases
from moe_lightning.bench.settings import Settings
from moe_lightning.layers import MoE
from moe_lightning.layers.experts import Implementation
from moe_lightning.ops.expert_ffn import missing

#: Routers that all choose the K largest logits, as peers do.
TOP_K = "top-k"
IMPLEMENTATIONS: tuple[Implementation, ...] = ("cutlass", "grouped_mm", "loop")


@dataclass(frozen=True)
class Variant:
    """A layer as a function of its tokens, and all that gets a gradient."""

    call: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...]
    x_TD: Tensor
    answer: str
    """Variants with the same one compute the same."""
    layers: tuple[MoE, ...] = ()
    """Those of ours, whose phases can be marked."""


@dataclass(frozen=True)
class Also:
    """Circumstances in which the first layer is measured once more, beside the others."""

    dtype: torch.dtype | None = None
    skew_experts: int = 0


@dataclass(frozen=True)
class Workload:
    """What one shape comes to."""

    variants: dict[str, Variant]
    load: dict[str, float]
    left_out: dict[str, str]
    """Name -> why."""


def available(implementations: list[str], shape: Shape, settings: Settings) -> dict[str, str | None]:
    """Each implementation, and why it cannot be had here; None when it can."""
    reason = missing(settings.dtype, settings.device, shape.d_model, shape.hidden_dim)
    aligned = shape.d_model % 8 == 0 and shape.hidden_dim % 8 == 0
    unaligned = None if aligned else "d_model and hidden_dim must be multiples of 8"
    reasons = {"cutlass": reason, "grouped_mm": unaligned, "loop": None}
    return {name: reasons[name] for name in implementations}


def build(
    shape: Shape, settings: Settings, implementations: list[str], peers: list[str], ceilings: Ceilings, also: Also
) -> Workload:
    """Build the layers; seeded."""
    cases = build_cases(settings.strategies, shape, settings, ceilings)
    variants: dict[str, Variant] = {}
    left_out: dict[str, str] = {}
    for strategy, case in cases.items():
        if case.without_layer is not None:
            left_out[strategy] = case.without_layer
        elif case.masked:
            variants[strategy] = _ours(strategy, case, "auto")
        else:
            for name, reason in available(implementations, shape, settings).items():
                if reason is None:
                    variants[f"{strategy}, {name}"] = _ours(strategy, case, name)  # type: ignore[arg-type]
                else:
                    left_out[name] = reason
    case = next(case for case in cases.values())
    if case.without_layer is None:
        for name, make in (PEERS[peer] for peer in peers):
            try:
                call, leaves = make(case.moe, shape.d_model, shape.hidden_dim)
            except ImportError as error:
                left_out[name] = f"not installed ({error})"
            else:
                variants[name] = Variant(call, leaves, case.x_TD, TOP_K)
        variants |= _also(also, case, shape, settings, implementations[0], ceilings)
    return Workload(variants, case.load(), left_out)


def _also(
    also: Also, like: Case, shape: Shape, settings: Settings, implementation: str, ceilings: Ceilings
) -> dict[str, Variant]:
    """The first router's layer in other circumstances."""
    strategy = settings.strategies[0]
    others = {}
    if also.dtype is not None:
        other = replace(settings, dtype=also.dtype)
        case = build_case(strategy, replace(shape, size=also.dtype.itemsize), other, ceilings)
        others[f"in {other.dtype_name}"] = case
    if also.skew_experts:
        case = build_case(strategy, shape, replace(settings, skew_experts=also.skew_experts), ceilings, like)
        others[f"max/mean {case.load()['max_over_mean']:.2f}"] = case
    return {
        f"{strategy}, {implementation}, {name}": replace(_ours(strategy, case, implementation), answer=name)  # type: ignore[arg-type]
        for name, case in others.items()
        if case.without_layer is None
    }


def _ours(strategy: str, case: Case, implementation: Implementation) -> Variant:
    moe = copy.copy(case.moe)  # the same weights, experts of its own
    moe._modules = dict(moe._modules)
    moe.experts = copy.copy(case.moe.experts)
    moe.experts.implementation = implementation
    answer = "sinkhorn" if strategy == "sinkhorn" else TOP_K
    return Variant(lambda x_TD: moe(x_TD)[0], tuple(moe.parameters()), case.x_TD, answer, (moe,))
