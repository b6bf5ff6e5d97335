"""One router at one shape: the MoE layer that is measured, and its phases as separate calls, forward and backward.

Forward calls record for autograd, as in training. Backward calls are `torch.autograd.grad` on the outputs of one
phase, with respect to all its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.calls import CallFactory, backward_factory, forward_factory, leaves
from moe_lightning.bench.cli import Settings
from moe_lightning.bench.roofline import Peaks, Shape, forward_costs
from moe_lightning.layers import Experts, MoE, Phase, Step
from moe_lightning.layers.phases import StepRecorder
from moe_lightning.metrics import ExpertLoadSummary
from moe_lightning.ops import Selection
from moe_lightning.routers import Router, router_class

#: A forward pass of the experts that takes longer than this, by the measured matmul rate, is left out.
LAYER_SECONDS = 1.0
#: On the CPU, bytes of the experts' weights, and of the rows that masked movement factories, beyond which likewise.
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


def build_case(name: str, shape: Shape, settings: Settings, peaks: Peaks, like: Case | None = None) -> Case:
    """Build the layer in `dtype`, in training mode, its gate in `dtype` too; seeded. Experts may be those of `like`."""
    device, dtype = settings.device, settings.dtype
    generator = torch.Generator(device).manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what masked_matmul costs is what is being measured
        options = settings.router_options(name)
        router = router_class(name)(shape.d_model, shape.num_experts, shape.top_k, fp32_logits=False, **options)
    router = router.to(device, dtype)
    with torch.device("meta"):
        experts = Experts(shape.d_model, shape.mlp_hidden_dim, shape.num_experts)
    masked = router.dispatch_mode == "masked"
    reason = _too_large(shape, masked, peaks, device)
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
    rows = (shape.num_experts, shape.tokens) if masked else (shape.tokens * router.slots,)
    rows_out = None
    if not masked or _masked_bytes(shape) <= _memory_limit(device):
        rows_out = torch.empty(*rows, shape.d_model, device=device, dtype=dtype).normal_(generator=generator)
        rows_out.requires_grad_()
    return Case(moe, x_TD.requires_grad_(), generator, masked, reason, rows_out)


def build_cases(routers: tuple[str, ...], shape: Shape, settings: Settings, peaks: Peaks) -> dict[str, Case]:
    """A case for each router; those that have experts share them."""
    cases: dict[str, Case] = {}
    for name in routers:
        like = next((case for case in cases.values() if case.without_layer is None), None)
        cases[name] = build_case(name, shape, settings, peaks, like)
    return cases


def _too_large(shape: Shape, masked: bool, peaks: Peaks, device: torch.device) -> str | None:
    """Why the experts are left out; None if they are not."""
    seconds = forward_costs(shape, masked)["T_experts"].flops / peaks.matmul
    if seconds > LAYER_SECONDS:
        return f"the experts would take {seconds:,.1f} s per pass (limit {LAYER_SECONDS:g} s)"
    weights, limit = shape.expert_weights * shape.size, _memory_limit(device)
    if weights > limit:
        return f"the experts' weights take {weights / 2**30:,.1f} GiB (limit {limit / 2**30:,.1f} GiB)"
    if masked and _masked_bytes(shape) > limit:
        return f"masked rows take {_masked_bytes(shape) / 2**30:,.1f} GiB (limit {limit / 2**30:,.1f} GiB)"
    return None


def _masked_bytes(shape: Shape) -> int:
    """What masked movement holds at once: hidden rows (3F), rows in and out, and the fp32 rows that are summed."""
    rows = shape.num_experts * shape.tokens
    return rows * (3 * shape.mlp_hidden_dim + 2 * shape.d_model) * shape.size + rows * shape.d_model * 4


def _memory_limit(device: torch.device) -> int:
    """Bytes that one case may take; on a GPU a quarter of what is free, as backward holds several times as much."""
    return CPU_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 4


#: A call and all tensors and modules that it reads.
Part = tuple[Callable[..., Any], tuple[Any, ...]]


class GivenRows:
    """Experts that return given rows: where the layer's own hold no weights."""

    def __init__(self, experts: Experts, rows: Tensor) -> None:
        self.fuses_weights, self._rows = experts.fuses_weights, rows

    def __call__(self, *_: Any) -> Tensor:
        """The rows."""
        return self._rows


def steps_of(moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool) -> dict[Phase, Step]:
    """The layer's steps.

    Args:
        moe: the layer.
        x_TD: tokens (T, D); a leaf that wants its gradient.
        rows_out: takes the place of the experts' outputs where there are none; None leaves T_unpack out.
        with_experts: False where the experts hold no weights: leaves T_experts out.
    """
    if with_experts:
        return moe.steps(x_TD)
    steps = StepRecorder()
    selection = moe.route(x_TD, steps).selection
    if rows_out is None:
        moe.dispatcher.dispatch(x_TD, selection, steps)
    else:
        moe.dispatcher.run(GivenRows(moe.experts, rows_out), x_TD, selection, steps)  # type: ignore[arg-type]
        del steps[Phase.EXPERTS]
    return steps


def forward_parts(moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool) -> dict[str, CallFactory]:
    """Each forward phase, by name; `route` and `layer` are all in one go; arguments as for `steps_of`."""
    return {name: forward_factory(*part) for name, part in _parts(moe, x_TD, rows_out, with_experts).items()}


def backward_parts(
    moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool, generator: torch.Generator
) -> dict[str, CallFactory]:
    """Each backward phase, by name; arguments as for `steps_of`. T_pack is T_index and T_permute in one.

    Without `rows_out` nothing that takes the gradient of the rows is made.
    """

    def logit(router: Router, x_TD: Tensor) -> Any:
        # The view passes the rows' gradient to x, where it is added to the gate's.
        return router.gate(x_TD), x_TD.view_as(x_TD)

    def pack(x_TD: Tensor, selection: Selection) -> Any:
        dispatched = moe.dispatcher.dispatch(x_TD, selection)
        return dispatched.rows, dispatched.handle

    parts = _parts(moe, x_TD, rows_out, with_experts)
    parts["T_logit"] = (logit, (moe.router, x_TD))
    parts["T_pack"] = (pack, (x_TD, moe.router(x_TD).selection))
    del parts["T_index"], parts["T_permute"]
    if rows_out is None:
        del parts["T_pack"], parts["route"]
    # The experts get the gradient of their rows laid out as combining leaves it.
    layouts = {"T_experts": _gradient_strides(*parts["T_unpack"])} if {"T_experts", "T_unpack"} <= set(parts) else {}
    return {name: backward_factory(*part, generator, layouts.get(name)) for name, part in parts.items()}


def movement_part(moe: MoE, x_TD: Tensor) -> CallFactory:
    """From a selection to the layer's output in one go."""
    return forward_factory(moe.dispatcher.run, (moe.experts, x_TD, moe.router(x_TD).selection))


def _parts(moe: MoE, x_TD: Tensor, rows_out: Tensor | None, with_experts: bool) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for phase, (_, call, inputs) in (steps := steps_of(moe, x_TD, rows_out, with_experts)).items():
        if phase is Phase.UNPACK:  # which reads nothing of the rows that the experts were given
            rows, dispatched = inputs
            inputs = rows, dispatched._replace(rows=rows.new_empty(0))
        if (module := steps[phase].module) is not None:
            call, inputs = steps[phase].call_with, (module, *inputs)
        parts[phase.time] = (call, leaves(inputs, False))  # without the graph of the recorded pass

    def route(router: Router, x_TD: Tensor) -> Any:
        dispatched = moe.dispatcher.dispatch(x_TD, router(x_TD).selection)
        return dispatched.rows, dispatched.handle  # which holds the weights, through which the gate gets its gradient

    parts["route"] = (route, (moe.router, x_TD))
    if with_experts:
        parts["layer"] = (lambda moe, x_TD: moe(x_TD)[0], (moe, x_TD))
    return parts


def _gradient_strides(combine: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the gradient of the rows, the first of the inputs."""
    y_TD = combine(*inputs)
    [gradient] = torch.autograd.grad(y_TD, inputs[0], torch.zeros_like(y_TD))
    return gradient.stride()
