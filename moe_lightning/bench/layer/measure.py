"""Times of a layer's forward and of forward and backward, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from moe_lightning.bench.accounting import Ceilings, Cost, Shape, backward_costs, forward_costs
from moe_lightning.bench.interleave import interleave
from moe_lightning.bench.layer.variants import Variant, Workload
from moe_lightning.bench.trace.recording import record

Call = Callable[[], Any]
DIRECTIONS = ("forward", "forward + backward")
#: One turn of a layer: long enough that most of it finds the device's queue full, as in training.
ROUND_SECONDS = 0.06
#: A forward output further than this, by norm, from that of the first variant with the same choices is reported.
AGREES = 0.02


def measure(work: Workload, shape: Shape, ceilings: Ceilings, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """One row a variant: times of both directions, rates, floors, memory, and how far its output is from another's."""
    grads = {name: _gradient(variant.x_TD) for name, variant in work.variants.items()}
    calls = {name: _calls(variant, grads[name]) for name, variant in work.variants.items()}
    times = {
        direction: interleave(
            {name: pair[i] for name, pair in calls.items()}, rounds, progress=progress, round_seconds=ROUND_SECONDS
        )
        for i, direction in enumerate(DIRECTIONS)
    }
    costs = _costs(shape)
    first: dict[str, tuple[str, Tensor]] = {}
    rows = []
    for name, variant in work.variants.items():
        with torch.no_grad():
            y_TD = variant.call(variant.x_TD).float()
        other, reference = first.setdefault(variant.answer, (name, y_TD))
        distance = float((y_TD - reference).norm() / reference.norm())
        row: dict[str, Any] = {"variant": name, "distance": distance, "compared_with": other}
        for direction in DIRECTIONS:
            spread, cost = times[direction][name].scaled(1e-3), costs[direction]
            seconds, floor = 1e-3 * spread.median, 1e-6 * ceilings.floor_us(cost)
            rates = {"tflops": 1e-12 * cost.flops / seconds, "x_floor": seconds / floor}
            row[direction] = {"ms": spread.median, **rates, "spread": {"ms": spread}}
        rows.append(row | _memory(variant, grads[name]))
    return rows


def trace(work: Workload, folder: str, progress: Progress) -> dict[str, str]:
    """Trace forward and backward of each variant; the files, by variant."""
    return {
        name: str(
            record(_calls(variant, _gradient(variant.x_TD))[1], variant.layers, variant.x_TD.device, folder, name)
        )
        for name, variant in progress.track(work.variants.items(), description="traces")
    }


def floors_ms(shape: Shape, ceilings: Ceilings) -> dict[str, float]:
    """The least each direction can take."""
    return {direction: 1e-3 * ceilings.floor_us(cost) for direction, cost in _costs(shape).items()}


def _costs(shape: Shape) -> dict[str, Cost]:
    """Of a layer in one go: tokens and weights in, outputs and gradients out; the products of the experts and gate.

    What a layer makes on its way costs nothing: rows need not be written.
    """
    forward, backward = forward_costs(shape, masked=False), backward_costs(shape, masked=False)
    x_TD, weights = shape.tokens * shape.d_model * shape.size, shape.expert_weights * shape.size
    gate = shape.experts * shape.d_model * shape.size
    flops = sum(cost.flops for cost in forward.values())
    both = flops + sum(cost.flops for cost in backward.values())
    # Backward reads tokens, weights and the gradient of y, and writes the gradients of tokens and weights.
    return {
        "forward": Cost(x_TD + weights + gate, x_TD, flops),
        "forward + backward": Cost(3 * x_TD + 2 * (weights + gate), 2 * x_TD + weights + gate, both),
    }


def _gradient(x_TD: Tensor) -> Tensor:
    generator = torch.Generator(x_TD.device).manual_seed(2)
    return torch.empty_like(x_TD).normal_(generator=generator)


def _calls(variant: Variant, grad_TD: Tensor) -> tuple[Call, Call]:
    x_TD = variant.x_TD

    def forward() -> Tensor:
        with torch.no_grad():
            return variant.call(x_TD)

    def both() -> Any:
        return torch.autograd.grad(variant.call(x_TD), (x_TD, *variant.leaves), grad_TD, allow_unused=True)

    return forward, both


def _memory(variant: Variant, grad_TD: Tensor) -> dict[str, float | None]:
    """MB that forward keeps for backward, output included, and the most that forward and backward take at once."""
    x_TD = variant.x_TD
    if x_TD.device.type != "cuda":
        return {"kept_mb": None, "peak_mb": None}
    torch.cuda.synchronize(x_TD.device)
    before = torch.cuda.memory_allocated(x_TD.device)
    torch.cuda.reset_peak_memory_stats(x_TD.device)
    y_TD = variant.call(x_TD)
    kept = torch.cuda.memory_allocated(x_TD.device) - before
    torch.autograd.grad(y_TD, (x_TD, *variant.leaves), grad_TD, allow_unused=True)
    peak = torch.cuda.max_memory_allocated(x_TD.device) - before
    return {"kept_mb": kept / 1e6, "peak_mb": peak / 1e6}
