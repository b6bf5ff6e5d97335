"""The phases of a real MoE layer as separate calls, forward and backward.

Forward calls record for autograd, as in training. Backward calls are `torch.autograd.grad` on the outputs of one
phase, with respect to all its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.calls import Make, backward_part, plain_part
from moe_lightning.layers import MoE


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
    dispatcher, selection = moe.dispatcher, moe.router.select(moe.router.gate(x_TD))

    def logit(router: Any, x_TD: Tensor) -> Any:
        # The view passes the rows' gradient to x, where it is added to the gate's.
        return router.gate(x_TD), x_TD.view_as(x_TD)

    def pack(x_TD: Tensor, selection: Any) -> Any:
        plan = dispatcher.plan(selection)
        [part] = dispatcher.dispatch(x_TD, plan)
        return part.rows, plan

    phases = dict(_phases(moe, x_TD, rows_out, with_experts))
    phases["T_logit"] = (logit, (moe.router, x_TD))
    phases["T_pack"] = (pack, (x_TD, selection))
    del phases["T_index"], phases["T_permute"]
    if rows_out is None:
        del phases["T_pack"], phases["route"]
    return {name: backward_part(call, inputs, generator) for name, (call, inputs) in phases.items()}


def movement_part(moe: MoE, x_TD: Tensor) -> Make:
    """From a selection to the layer's output in one go: plan, dispatch, experts, combine."""

    def move(experts: Any, x_TD: Tensor, selection: Any) -> Any:
        plan = moe.dispatcher.plan(selection)
        [part] = moe.dispatcher.dispatch(x_TD, plan)
        return moe.dispatcher.combine([experts(part.rows, part.expert_offsets)], plan, weighted=False)

    return plain_part(move, (moe.experts, x_TD, moe.router(x_TD).selection))


def _phases(
    moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool
) -> Iterator[tuple[str, tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """(name, (call, inputs)); the inputs hold all tensors that the phase reads."""
    router, dispatcher = moe.router, moe.dispatcher
    logits_TE = router.gate(x_TD)
    selection = router.select(logits_TE)
    plan = dispatcher.plan(selection)

    def dispatched(x_TD: Tensor, plan: Any) -> Tensor:
        [part] = dispatcher.dispatch(x_TD, plan)
        return part.rows

    def route(router: Any, x_TD: Tensor) -> Any:
        plan = dispatcher.plan(router.select(router.gate(x_TD)))
        return dispatched(x_TD, plan), plan

    yield "T_logit", (lambda router, x_TD: router.gate(x_TD), (router, x_TD))
    yield "T_select", (router.select, (logits_TE,))
    yield "T_index", (dispatcher.plan, (selection,))
    yield "T_permute", (dispatched, (x_TD, plan))
    yield "route", (route, (router, x_TD))
    if with_experts:
        [part] = dispatcher.dispatch(x_TD, plan)
        yield "T_experts", (lambda experts, *rest: experts(*rest), (moe.experts, part.rows, part.expert_offsets))
    if rows_out is not None:
        yield "T_unpack", (lambda rows, plan: dispatcher.combine([rows], plan, weighted=False), (rows_out, plan))
    if with_experts:
        yield "layer", (lambda moe, x_TD: moe(x_TD)[0], (moe, x_TD))
