"""One strategy at one shape: the MoE layer that is measured, and its phases as separate calls, forward and backward.

Forward calls record for autograd, as in training. Backward calls are `torch.autograd.grad` on the outputs of one
phase, with respect to all its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.calls import Make, backward_part, plain_part
from moe_lightning.bench.cli import Settings
from moe_lightning.bench.roofline import Ceilings, Shape, forward_costs
from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.dispatch import Part
from moe_lightning.metrics import ExpertLoadSummary
from moe_lightning.routers import Router, router_class

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


class Steps:
    """The steps of a layer on one device, which together are its forward pass.

    `folds`: the experts scale their rows by the combine weights, and combining is a plain sum, as in `MoE.forward`.
    """

    def __init__(self, moe: MoE, x_TD: Tensor) -> None:
        self.router, self.dispatcher = moe.router, moe.dispatcher
        self.folds = moe.dispatcher.carries_weights and moe.experts.takes_weights(x_TD)

    def permute(self, x_TD: Tensor, plan: Any) -> Part:
        """Tokens to rows (T_permute)."""
        [part] = self.dispatcher.dispatch(x_TD, plan)
        return part if self.folds else replace(part, row_weights=None)

    def experts(self, experts: Experts, part: Part) -> Tensor:
        """Rows to rows (T_experts)."""
        groups = experts.groups(part.rows, self.dispatcher.expert_groups, self.dispatcher.parts)
        done = experts(part.rows, part.expert_offsets, part.row_weights, part.buffer, groups[part.group])
        [rows] = self.dispatcher.send_back(done, part, weighted=self.folds)
        return rows

    def combine(self, rows: Tensor, plan: Any) -> Tensor:
        """Rows to tokens (T_unpack)."""
        return self.dispatcher.combine([rows], plan, weighted=self.folds)

    def pack(self, x_TD: Tensor, selection: Any) -> tuple[Part, Any]:
        """From a selection to the rows of the experts (T_index, T_permute)."""
        plan = self.dispatcher.plan(selection)
        return self.permute(x_TD, plan), plan

    def move(self, experts: Experts, x_TD: Tensor, selection: Any) -> Tensor:
        """From a selection to the output of the layer."""
        part, plan = self.pack(x_TD, selection)
        return self.combine(self.experts(experts, part), plan)


def forward_parts(moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool) -> dict[str, Make]:
    """Each forward phase, by name; `route` and `layer` are all in one go.

    Args:
        moe: the layer.
        x_TD: tokens (T, D); a leaf that wants its gradient.
        rows_out: stands for what the experts return, the shape of the rows; None leaves T_unpack out.
        with_experts: False where the experts hold no weights: leaves T_experts and `layer` out.
    """
    return {name: plain_part(call, inputs) for name, (call, inputs) in _phases(moe, x_TD, rows_out, with_experts)}


def backward_parts(
    moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool, generator: torch.Generator
) -> dict[str, Make]:
    """Each backward phase, by name; arguments as for `forward_parts`. T_pack is T_index and T_permute in one.

    Without `rows_out` nothing that takes the gradient of the rows is made.
    """

    steps = Steps(moe, x_TD)

    def logit(router: Router, x_TD: Tensor) -> Any:
        # The view passes the rows' gradient to x, where it is added to the gate's.
        return router.gate(x_TD), x_TD.view_as(x_TD)

    def pack(x_TD: Tensor, selection: Any) -> Any:
        part, plan = steps.pack(x_TD, selection)
        return part.rows, plan

    phases = dict(_phases(moe, x_TD, rows_out, with_experts))
    phases["T_logit"] = (logit, (moe.router, x_TD))
    phases["T_pack"] = (pack, (x_TD, moe.router(x_TD).selection))
    del phases["T_index"], phases["T_permute"]
    if rows_out is None:
        del phases["T_pack"], phases["route"]
    # The experts get the gradient of their rows laid out as combining leaves it.
    layouts = {"T_experts": _gradient_strides(*phases["T_unpack"])} if {"T_experts", "T_unpack"} <= set(phases) else {}
    return {name: backward_part(call, inputs, generator, layouts.get(name)) for name, (call, inputs) in phases.items()}


def movement_part(moe: MoE, x_TD: Tensor) -> Make:
    """From a selection to the layer's output in one go: plan, dispatch, experts, combine."""
    return plain_part(Steps(moe, x_TD).move, (moe.experts, x_TD, moe.router(x_TD).selection))


def _phases(
    moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool
) -> Iterator[tuple[str, tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """(name, (call, inputs)); the inputs hold all tensors that the phase reads."""
    steps, router = Steps(moe, x_TD), moe.router
    logits_TE = router.gate(x_TD)
    selection = router.select(logits_TE)
    plan = moe.dispatcher.plan(selection)

    def route(router: Router, x_TD: Tensor) -> Any:
        part, plan = steps.pack(x_TD, router.select(router.gate(x_TD)))
        return part.rows, plan

    yield "T_logit", (lambda router, x_TD: router.gate(x_TD), (router, x_TD))
    yield "T_select", (router.select, (logits_TE,))
    yield "T_index", (moe.dispatcher.plan, (selection,))
    yield "T_permute", (lambda x_TD, plan: steps.permute(x_TD, plan).rows, (x_TD, plan))
    yield "route", (route, (router, x_TD))
    if with_experts:
        yield "T_experts", (steps.experts, (moe.experts, steps.permute(x_TD, plan)))
    if rows_out is not None:
        yield "T_unpack", (steps.combine, (rows_out, plan))
    if with_experts:
        yield "layer", (lambda moe, x_TD: moe(x_TD)[0], (moe, x_TD))


def _gradient_strides(combine: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the gradient of the rows, the first of the inputs."""
    y_TD = combine(*inputs)
    [gradient] = torch.autograd.grad(y_TD, inputs[0], torch.zeros_like(y_TD))
    return gradient.stride()
