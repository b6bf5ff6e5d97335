"""The phases of a real MoE layer as separate calls, forward and backward: the calls that `MoE.forward` makes.

Forward calls record for autograd, as in training. Backward calls are `torch.autograd.grad` on the outputs of one
phase, with respect to all its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.calls import Make, backward_part, plain_part
from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.dispatch import Part
from moe_lightning.routers import Router


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
