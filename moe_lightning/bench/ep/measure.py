"""One router_name across the ranks: its phases, its exchange, and the layer with and without overlap.

Names and formulas are in docs/benchmarks.md. Times are of the slowest rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.bench.calls import differentiable
from moe_lightning.bench.cli import Settings
from moe_lightning.bench.commands.trace import Overlap, of_layers, read_trace, record_trace
from moe_lightning.bench.ep.movement import StubDispatcher, all_to_all_movement, exchanges, symmetric_movement
from moe_lightning.bench.ep.ranks import measure
from moe_lightning.bench.roofline import Shape
from moe_lightning.bench.spread import Spread, as_row, medians, sum_of_parts, total
from moe_lightning.expert_parallel.all_to_all import (
    AllToAllDispatcher,
    Splits,
    exchange_counts,
    recv_perms,
    wait_splits,
)
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.dispatch import Dispatcher
from moe_lightning.metrics import ExpertLoadSummary
from moe_lightning.ops import permute
from moe_lightning.ops.ep_layout import send_counts
from moe_lightning.routers import Router, router_class

#: Its selection is what others are compared with.
BASELINE = "naive_topk"
#: The parts of a layer with blocking exchanges.
PARTS = ("T_counts", "T_comm", "T_comp")


def measure_router(
    router_name: str,
    shape: Shape,
    settings: Settings,
    chunks: int,
    device: torch.device,
    memory: SymmetricMemory | None = None,
    trace_folder: str | None = None,
) -> dict[str, Any]:
    """Times in microseconds, skew, and metrics derived from them; with `memory`, also those of writing to it.

    With `trace_folder` each layer is traced too, once it has been timed.
    """
    moe, x_TD = _layer(router_name, shape, settings, device)
    group = dist.group.WORLD
    assert group is not None
    arguments = shape.num_experts, moe.router.slots, moe.router.drops_tokens, group
    overlapping = AllToAllDispatcher(*arguments, chunks)
    blocking, stub = AllToAllDispatcher(*arguments), StubDispatcher(*arguments)
    grad_TD = torch.randn_like(x_TD)

    def layer(dispatcher: Dispatcher) -> Callable[[], Any]:
        def call() -> Any:
            moe.dispatcher = dispatcher
            if not settings.backward:
                with torch.no_grad():
                    return moe(x_TD)[0]
            leaf_TD = x_TD.detach().requires_grad_()
            return torch.autograd.grad(moe(leaf_TD)[0], (leaf_TD, *differentiable(moe)), grad_TD)

        return call

    with torch.no_grad():
        logits_TE = moe.router.gate(x_TD)
        selection = moe.router.select(logits_TE)
        stub.index(selection)  # keeps the counts of this exchange
        movement = all_to_all_movement(blocking, x_TD, selection)
        handle = blocking.index(selection)
        splits = wait_splits(handle.counts, blocking.layout.rank)
        send_WCL = send_counts(handle.routing_index.expert_offsets, blocking.layout)

    def counts() -> Any:
        pending = exchange_counts(group, send_WCL, blocking.layout)
        return recv_perms(pending, wait_splits(pending, blocking.layout.rank), blocking.layout)

    end_to_end = {"T_seq": layer(blocking), "T_comp": layer(stub)}
    if chunks > 1:  # one chunk is the layer with blocking exchanges
        end_to_end["T_overlapped"] = layer(overlapping)
    calls = {
        "T_logit": _no_grad(lambda: moe.router.gate(x_TD)),
        "T_select": _no_grad(lambda: moe.router.select(logits_TE)),
        "T_pack": _no_grad(lambda: permute(x_TD, stub.index(selection).routing_index, moe.router.slots)),
        "T_counts": _no_grad(counts),
        "T_comm": _no_grad(exchanges(blocking, splits, x_TD, times=2 if settings.backward else 1)),
        **end_to_end,
        **{name: _no_grad(call) for name, call in movement.items()},
    }
    if router_name != BASELINE:
        baseline = _router(BASELINE, shape, settings, device)
        calls["T_select_naive"] = _no_grad(lambda: baseline.select(logits_TE))
    if memory is not None:
        symmetric = SymmetricDispatcher(shape.num_experts, moe.router.slots, memory)
        with torch.no_grad():
            symmetric_calls = symmetric_movement(symmetric, x_TD, selection)
        calls |= {f"symmetric/{name}": _no_grad(call) for name, call in symmetric_calls.items()}
        calls["symmetric/T_layer"] = layer(symmetric)
    spread = measure(calls, settings.rounds, device)
    spread.setdefault("T_overlapped", spread["T_seq"])
    spread.setdefault("T_select_naive", spread["T_select"])
    prefix = "symmetric/"
    symmetric_spread = {name.removeprefix(prefix): spread.pop(name) for name in list(spread) if name.startswith(prefix)}
    times = medians(spread)
    result = {"router": router_name, **as_row(spread), **derived(times, chunks), "sum_of_parts": parts_check(spread)}
    result |= _skew(selection.tokens_per_expert_E, splits)
    if trace_folder is not None:
        layers = {"eta_trace_blocking": (blocking, "blocking")}
        if chunks > 1:
            layers["eta_trace"] = overlapping, f"{chunks}-chunks"
        for name, (dispatcher, label) in layers.items():
            result[name] = eta_trace(layer(dispatcher), moe, device, trace_folder, f"{router_name}.{label}")
        result.setdefault("eta_trace", result["eta_trace_blocking"])
        if memory is not None:
            record_trace(
                calls["symmetric/T_layer"], [moe], device, trace_folder, f"{router_name}.symmetric", dist.get_rank()
            )
    if symmetric_spread:
        result["symmetric"] = as_row(symmetric_spread) | _gained(times, symmetric_spread["T_layer"].median)
    return result


def _layer(router_name: str, shape: Shape, settings: Settings, device: torch.device) -> tuple[MoE, Tensor]:
    """This rank's share of the experts; the gate is the same on every rank, the tokens are its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator(device).manual_seed(0)
    router = _router(router_name, shape, settings, device)
    with torch.device("meta"):
        experts = Experts(shape.d_model, shape.mlp_hidden_dim, shape.num_experts // world)
    experts = experts.to(settings.dtype).to_empty(device=device)
    with torch.no_grad():
        router.weight.normal_(0, 0.02, generator=generator)
        generator.manual_seed(100 + rank)
        for parameter in experts.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        x_TD = torch.empty(shape.tokens, shape.d_model, device=device, dtype=settings.dtype)
        x_TD.normal_(generator=generator)
    return MoE(router, experts).train(), x_TD


def _router(router_name: str, shape: Shape, settings: Settings, device: torch.device) -> Router:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = settings.router_options(router_name)
        router = router_class(router_name)(shape.d_model, shape.num_experts, shape.top_k, fp32_logits=False, **options)
    return router.to(device, settings.dtype)


def _no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    def without_gradient() -> Any:
        with torch.no_grad():
            return call()

    return without_gradient


def derived(times: dict[str, float], chunks: int) -> dict[str, float | None]:
    """Metrics of the times, nothing clamped; None where a denominator is 0, and of overlap where there is one chunk:
    that layer has blocking exchanges.
    """
    overlap: dict[str, float | None] = dict.fromkeys(("eta_overlap", "eta_ect", "eta_bound", "speedup_overlap"))
    if chunks > 1:
        overlap = _gained(times, times["T_overlapped"]) | {
            "eta_bound": 1 - 1 / chunks,
            "speedup_overlap": times["T_seq"] / times["T_overlapped"],
        }
    return overlap | {
        "delta_select": times["T_select"] - times["T_select_naive"],
        "comm_share": times["T_comm"] / times["T_seq"],
        "beyond_all_to_all": times["T_dispatch"] - times["T_all_to_all"],
    }


def parts_check(spread: dict[str, Spread]) -> dict[str, Any]:
    """The exchanges, the exchange of counts before them, and all else, against the layer with blocking exchanges.

    T_comp includes gate, selection and packing.
    """
    return sum_of_parts(total(spread[name] for name in PARTS), spread["T_seq"])


def _gained(times: dict[str, float], layer: float) -> dict[str, float | None]:
    """What a layer of so many us gains on the one with blocking exchanges, over all there is to gain."""
    hidden, exposed = times["T_seq"] - layer, times["T_seq"] - times["T_comp"]
    return {
        "eta_overlap": hidden / min(times["T_comm"], times["T_comp"]),
        "eta_ect": hidden / exposed if exposed else None,
    }


def _skew(counts_E: Tensor, splits: Splits) -> dict[str, float]:
    """Of experts and of ranks, from counts summed over the ranks."""
    counts_E = counts_E.long().clone()
    dist.all_reduce(counts_E)
    experts = ExpertLoadSummary(counts_E[None], counts_E.sum())
    summaries = {"expert": experts, "rank": experts.of_ranks(dist.get_world_size())}
    result: dict[str, float] = {}
    for name, summary in summaries.items():
        result |= {f"{name}_max_over_mean": float(summary.max_over_mean_L), f"{name}_cv": float(summary.cv_L)}
    [send] = splits.send
    sent = torch.tensor(sum(send), device=counts_E.device)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return result | {"rows_sent": int(sent)}


def eta_trace(call: Callable[[], Any], moe: MoE, device: torch.device, folder: str, name: str) -> float | None:
    """Over all ranks, each of which writes a file; they start every call together. None where nothing is exchanged."""

    def together() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        call()

    own = of_layers(read_trace(record_trace(together, [moe], device, folder, name, dist.get_rank())))
    sums = torch.tensor([own.comm_us, own.comp_us, own.overlap_us], device=device, dtype=torch.float64)
    dist.all_reduce(sums)
    return Overlap(*sums.tolist()).eta_trace
