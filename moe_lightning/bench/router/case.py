"""One strategy at one shape: the MoE layer that is measured, and what of it can be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.bench.accounting import Ceilings, Shape, forward_costs
from moe_lightning.bench.settings import Settings
from moe_lightning.layers import Experts, MoE
from moe_lightning.metrics import ExpertLoadSummary
from moe_lightning.routers import router_class

#: A forward pass of the experts that takes longer than this, by the measured matmul rate, is left out.
LAYER_SECONDS = 1.0
#: On the CPU, bytes of the experts' weights, and of the rows that masked movement makes, beyond which likewise.
CPU_BYTES = 2**31


@dataclass(frozen=True)
class Case:
    """A layer and its input."""

    moe: MoE
    x_TD: Tensor
    generator: torch.Generator
    masked: bool
    without_layer: str | None
    """Why the experts hold no weights; None when they do."""
    rows_out: Tensor | None
    """Random, the shape that the experts return; None where that is too large."""

    def load(self) -> dict[str, float]:
        """Skew of the experts' load: max/mean and the coefficient of variation."""
        with torch.no_grad():
            counts_E = self.moe.router(self.x_TD).selection.tokens_per_expert_E
        summary = ExpertLoadSummary(counts_E[None].long(), counts_E.sum())
        return {"max_over_mean": summary.max_over_mean_L.item(), "cv": summary.cv_L.item()}


def build_case(strategy: str, shape: Shape, settings: Settings, ceilings: Ceilings, like: Case | None = None) -> Case:
    """Build the layer in `dtype`, in training mode, its gate in `dtype` too; seeded. Experts may be those of `like`."""
    device, dtype = settings.device, settings.dtype
    generator = torch.Generator(device).manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what masked_matmul costs is what is being measured
        options = settings.router_options(strategy)
        router = router_class(strategy)(shape.d_model, shape.experts, shape.top_k, fp32_logits=False, **options)
    router = router.to(device, dtype)
    with torch.device("meta"):
        experts = Experts(shape.d_model, shape.hidden_dim, shape.experts)
    masked = router.movement == "masked"
    reason = _too_dear(shape, masked, ceilings, device)
    fresh = [router.weight]
    if reason is None and like is not None and like.without_layer is None:
        experts = like.moe.experts
    elif reason is None:
        experts = experts.to(dtype).to_empty(device=device)
        fresh += experts.parameters()
    moe = MoE(router, experts).train()
    with torch.no_grad():
        for parameter in fresh:
            parameter.normal_(0, 0.02, generator=generator)
    generator.manual_seed(1)  # the tokens are the same whatever was drawn before
    x_TD = torch.empty(shape.tokens, shape.d_model, device=device, dtype=dtype).normal_(generator=generator)
    rows = (shape.experts, shape.tokens) if masked else (shape.slots,)
    rows_out = None
    if not masked or _masked_bytes(shape) <= _room(device):
        rows_out = torch.empty(*rows, shape.d_model, device=device, dtype=dtype).normal_(generator=generator)
        rows_out.requires_grad_()
    return Case(moe, x_TD.requires_grad_(), generator, masked, reason, rows_out)


def build_cases(strategies: tuple[str, ...], shape: Shape, settings: Settings, ceilings: Ceilings) -> dict[str, Case]:
    """A case for each strategy; those that have experts share them."""
    cases: dict[str, Case] = {}
    for name in strategies:
        like = next((case for case in cases.values() if case.without_layer is None), None)
        cases[name] = build_case(name, shape, settings, ceilings, like)
    return cases


def _too_dear(shape: Shape, masked: bool, ceilings: Ceilings, device: torch.device) -> str | None:
    """Why the experts are left out; None if they are not."""
    seconds = forward_costs(shape, masked)["T_experts"].flops / ceilings.matmul
    if seconds > LAYER_SECONDS:
        return f"the experts would take {seconds:,.1f} s a pass (limit {LAYER_SECONDS:g} s)"
    weights, room = shape.expert_weights * shape.size, _room(device)
    if weights > room:
        return f"the experts' weights take {weights / 2**30:,.1f} GiB (limit {room / 2**30:,.1f} GiB)"
    if masked and _masked_bytes(shape) > room:
        return f"masked rows take {_masked_bytes(shape) / 2**30:,.1f} GiB (limit {room / 2**30:,.1f} GiB)"
    return None


def _masked_bytes(shape: Shape) -> int:
    """What masked movement holds at once: hidden rows (3F), rows in and out, and the fp32 rows that are summed."""
    rows = shape.experts * shape.tokens
    return rows * (3 * shape.hidden_dim + 2 * shape.d_model) * shape.size + rows * shape.d_model * 4


def _room(device: torch.device) -> int:
    """Bytes that one case may take; on a GPU a quarter of what is free, as backward holds several times as much."""
    return CPU_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
