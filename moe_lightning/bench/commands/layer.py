"""The whole MoE layer, forward and forward + backward: `python -m moe_lightning.bench layer`.

Every experts implementation and router asked for, and other people's layers where they are installed, on the same
weights and tokens, interleaved. Forward is without gradient. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from moe_lightning.bench.baselines import LAYERS
from moe_lightning.bench.calls import differentiable
from moe_lightning.bench.cli import DTYPES, Parser, Settings, measured_peaks, shapes
from moe_lightning.bench.commands.trace import record_trace
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.record import write_record
from moe_lightning.bench.roofline import Cost, Peaks, Shape, backward_costs, forward_costs
from moe_lightning.bench.router.case import Case, build_case, build_cases
from moe_lightning.bench.router.table import shape_title
from moe_lightning.bench.spread import print_noise, with_spread
from moe_lightning.bench.timers import interleave
from moe_lightning.layers import MoE
from moe_lightning.layers.experts import Implementation
from moe_lightning.ops.expert_ffn import missing
from moe_lightning.routers import ROUTERS, BiasBalanced, TopK
from moe_lightning.utils.checks import check_choice, check_int

#: tokens, d_model, mlp_hidden_dim, num_experts, top_k of models that people train.
PUBLISHED = (
    (4096, 4096, 2048, 64, 2),
    (4096, 4096, 14336, 8, 2),
    (32768, 2048, 768, 128, 8),
    (16384, 4096, 1024, 64, 8),
    (4096, 4096, 11008, 64, 2),
)
#: Routers that all choose the K largest logits, as the baselines do.
TOP_K = "top-k"
IMPLEMENTATIONS: tuple[Implementation, ...] = ("cutlass", "grouped_mm", "loop")
Call = Callable[[], Any]
DIRECTIONS = ("forward", "forward + backward")
#: One round of a layer: long enough that most of it finds the device's queue full, as in training.
ROUND_SECONDS = 0.06
#: A forward output further than this, by norm, from that of the first variant with the same choices is reported.
AGREES = 0.02


@dataclass(frozen=True)
class Variant:
    """A layer as a function of its tokens, and all that gets a gradient."""

    call: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...]
    x_TD: Tensor
    equivalence_group: str
    """Variants of the same one compute the same."""
    layers: tuple[MoE, ...] = ()
    """Those of ours, whose phases a trace names."""


@dataclass(frozen=True)
class ExtraCase:
    """The first layer once more, in another dtype or under a skewed load."""

    dtype: torch.dtype | None = None
    skew_experts: int = 0


@dataclass(frozen=True)
class Workload:
    """All that is measured at one shape."""

    variants: dict[str, Variant]
    load: dict[str, float]
    left_out: dict[str, str]
    """Name -> why."""


def available(implementations: list[str], shape: Shape, settings: Settings) -> dict[str, str | None]:
    """Each implementation, and why it cannot run here; None where it can."""
    reason = missing(settings.dtype, settings.device, shape.d_model, shape.mlp_hidden_dim)
    aligned = shape.d_model % 8 == 0 and shape.mlp_hidden_dim % 8 == 0
    unaligned = None if aligned else "d_model and mlp_hidden_dim must be multiples of 8"
    reasons = {"cutlass": reason, "grouped_mm": unaligned, "loop": None}
    return {name: reasons[name] for name in implementations}


def build(
    shape: Shape, settings: Settings, implementations: list[str], baselines: list[str], peaks: Peaks, extra: ExtraCase
) -> Workload:
    """Build the layers; seeded."""
    cases = build_cases(settings.routers, shape, settings, peaks)
    variants: dict[str, Variant] = {}
    left_out: dict[str, str] = {}
    for router, case in cases.items():
        if case.without_layer is not None:
            left_out[router] = case.without_layer
        elif case.masked:
            variants[router] = _ours(router, case, "auto")
        else:
            for name, reason in available(implementations, shape, settings).items():
                if reason is None:
                    variants[f"{router}, {name}"] = _ours(router, case, name)  # type: ignore[arg-type]
                else:
                    left_out[name] = reason
    case = next(case for case in cases.values())
    if case.without_layer is None:
        for name, make in (LAYERS[name] for name in baselines):
            try:
                call, leaves = make(case.moe, shape.d_model, shape.mlp_hidden_dim)
            except ImportError as error:
                left_out[name] = f"not installed ({error})"
            else:
                variants[name] = Variant(call, leaves, case.x_TD, TOP_K)
        first = next(name for name, reason in available(implementations, shape, settings).items() if reason is None)
        variants |= _extra(extra, case, shape, settings, first, peaks)
    return Workload(variants, case.load(), left_out)


def _extra(
    extra: ExtraCase, like: Case, shape: Shape, settings: Settings, implementation: str, peaks: Peaks
) -> dict[str, Variant]:
    """The first router's layer in another dtype, and under another load."""
    router = settings.routers[0]
    others = {}
    if extra.dtype is not None:
        other = replace(settings, dtype=extra.dtype)
        case = build_case(router, replace(shape, size=extra.dtype.itemsize), other, peaks)
        others[f"in {other.dtype_name}"] = case
    if extra.skew_experts:
        case = build_case(router, shape, replace(settings, skew_experts=extra.skew_experts), peaks, like)
        others[f"max/mean {case.load()['max_over_mean']:.2f}"] = case
    return {
        f"{router}, {implementation}, {name}": replace(_ours(router, case, implementation), equivalence_group=name)  # type: ignore[arg-type]
        for name, case in others.items()
        if case.without_layer is None
    }


def _ours(router: str, case: Case, implementation: Implementation) -> Variant:
    moe = copy.copy(case.moe)  # the same weights, experts of its own
    moe._modules = dict(moe._modules)
    moe.experts = copy.copy(case.moe.experts)
    moe.experts.implementation = implementation
    kind = type(moe.router)
    group = TOP_K if issubclass(kind, TopK) and not issubclass(kind, BiasBalanced) else router
    return Variant(lambda x_TD: moe(x_TD)[0], tuple(differentiable(moe)), case.x_TD, group, (moe,))


def measure(work: Workload, shape: Shape, peaks: Peaks, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """One row per variant: times of both directions, rates, memory, and how far its output is from another's."""
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
        other, reference = first.setdefault(variant.equivalence_group, (name, y_TD))
        distance = float((y_TD - reference).norm() / reference.norm())
        row: dict[str, Any] = {"variant": name, "distance": distance, "compared_with": other}
        for direction in DIRECTIONS:
            spread, cost = times[direction][name].scaled(1e-3), costs[direction]
            seconds, bound = 1e-3 * spread.median, 1e-6 * peaks.roofline_us(cost)
            rates = {"tflops": 1e-12 * cost.flops / seconds, "x_sol": seconds / bound}
            row[direction] = {"ms": spread.median, **rates, "spread": {"ms": spread}}
        rows.append(row | _memory(variant, grads[name]))
    return rows


def trace(work: Workload, folder: str, progress: Progress) -> dict[str, str]:
    """Trace forward and backward of each variant; the files, by variant."""
    return {
        name: str(
            record_trace(_calls(variant, _gradient(variant.x_TD))[1], variant.layers, variant.x_TD.device, folder, name)
        )
        for name, variant in progress.track(work.variants.items(), description="traces")
    }


def roofline_ms(shape: Shape, peaks: Peaks) -> dict[str, float]:
    """The least that each direction can take."""
    return {direction: 1e-3 * peaks.roofline_us(cost) for direction, cost in _costs(shape).items()}


def _costs(shape: Shape) -> dict[str, Cost]:
    """Of a layer in one go: tokens and weights in, outputs and gradients out; the products of the experts and gate.

    What a layer makes in between costs nothing: rows need not be written.
    """
    forward, backward = forward_costs(shape, masked=False), backward_costs(shape, masked=False)
    x_TD, weights = shape.tokens * shape.d_model * shape.size, shape.expert_weights * shape.size
    gate = shape.num_experts * shape.d_model * shape.size
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
    """MB that forward saves for backward, output included, and the most that forward and backward take at once."""
    x_TD = variant.x_TD
    if x_TD.device.type != "cuda":
        return {"saved_mb": None, "peak_mb": None}
    torch.cuda.synchronize(x_TD.device)
    before = torch.cuda.memory_allocated(x_TD.device)
    torch.cuda.reset_peak_memory_stats(x_TD.device)
    y_TD = variant.call(x_TD)
    saved = torch.cuda.memory_allocated(x_TD.device) - before
    torch.autograd.grad(y_TD, (x_TD, *variant.leaves), grad_TD, allow_unused=True)
    peak = torch.cuda.max_memory_allocated(x_TD.device) - before
    return {"saved_mb": saved / 1e6, "peak_mb": peak / 1e6}


def _table(result: dict[str, Any], settings: Settings) -> Table:
    load = result["load"]
    captions = [f"left out: {name}, {reason}" for name, reason in result["left_out"].items()]
    for row in result["rows"]:
        if not row["distance"] <= AGREES:
            captions.append(f"{row['variant']}: its output is {row['distance']:.1%} away from {row['compared_with']}")
    bounds = ", ".join(f"{direction} {ms:.2f} ms" for direction, ms in result["roofline_ms"].items())
    table = Table(
        title=f"{shape_title(result)}, {settings.dtype_name}, {settings.device_name}\n"
        f"load max/mean {load['max_over_mean']:.2f}, CV {load['cv']:.2f}; roofline: {bounds}",
        caption="\n".join(captions) or None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for direction in DIRECTIONS:
        for column in (f"{direction} ms", "TFLOP/s", "x SOL"):
            table.add_column(column, justify="right")
    for column in ("saved MB", "peak MB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = []
        for direction in DIRECTIONS:
            part = row[direction]
            ms = with_spread(f"{part['ms']:,.2f}", part["spread"]["ms"])
            cells += [ms, f"{part['tflops']:,.3g}", f"{part['x_sol']:.2f}"]
        cells += ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("saved_mb", "peak_mb")]
        table.add_row(row["variant"], *cells)
    return table


def _one(
    shape: Shape,
    settings: Settings,
    implementations: list[str],
    baselines: list[str],
    extra: ExtraCase,
    peaks: Any,
    progress: Progress,
    trace_folder: str | None,
) -> dict[str, Any]:
    with side_stream(settings.device):
        work = build(shape, settings, implementations, baselines, peaks, extra)
        return {
            **dataclasses.asdict(shape),
            "load": work.load,
            "left_out": work.left_out,
            "roofline_ms": roofline_ms(shape, peaks),
            "rows": measure(work, shape, peaks, settings.rounds, progress),
            "traces": trace(work, trace_folder, progress) if trace_folder is not None else {},
        }


def _parser() -> Parser:
    parser = Parser("layer", __doc__)
    parser.add_routers(ROUTERS, "fused_select", "bf16")
    parser.add_layer()
    parser.add_argument("--published", action="store_true", help="the five sizes of the published table instead")
    parser.add_argument("--implementation", nargs="+", help=f"{', '.join(IMPLEMENTATIONS)}; default: all there are")
    parser.add_argument(
        "--baselines", nargs="*", default=list(LAYERS), help="other people's layers; default: all installed"
    )
    parser.add_argument("--extra_dtype", help="the first layer once more, in this dtype")
    parser.add_argument("--extra_skew_experts", type=int, default=0, help="and with this many experts biased")
    parser.add_results(rounds=15)
    parser.add_trace()
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record, draw."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    settings = parser.settings(flags, backward=True)
    implementations = list(dict.fromkeys(flags.implementation or IMPLEMENTATIONS))
    for name in implementations:
        check_choice("bench.layer", "implementation", name, IMPLEMENTATIONS)
    for name in flags.baselines:
        check_choice("bench.layer", "baselines", name, LAYERS)
    if flags.extra_dtype:
        check_choice("bench.layer", "extra_dtype", flags.extra_dtype, DTYPES)
    names = ("tokens", "d_model", "mlp_hidden_dim", "num_experts", "top_k")
    sizes = [dict(zip(names, size, strict=True)) for size in PUBLISHED] if flags.published else [vars(flags)]
    check_int(
        "bench.layer", "extra_skew_experts", flags.extra_skew_experts, 0, min(size["num_experts"] for size in sizes)
    )
    extra = ExtraCase(DTYPES.get(flags.extra_dtype), flags.extra_skew_experts)
    swept = [shape for size in sizes for shape in shapes("bench.layer", settings, size)]
    if flags.implementation:
        for name, reason in available(implementations, swept[0], settings).items():
            if reason:
                raise ValueError(f"bench.layer: --implementation {name} is not possible: {reason}")
    console = Console(width=150)
    peaks = measured_peaks(settings, console)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("shapes", total=len(swept))
        for shape in swept:
            results.append(_one(shape, settings, implementations, flags.baselines, extra, peaks, progress, flags.trace))
            console.print(_table(results[-1], settings))
            spreads = {
                f"{row['variant']}, {direction}": row[direction]["spread"]["ms"]
                for row in results[-1]["rows"]
                for direction in DIRECTIONS
            }
            print_noise(console, spreads)
            for name, path in results[-1]["traces"].items():
                console.print(f"trace: {name}: {path}", soft_wrap=True)
            progress.advance(task)
    if flags.json:
        record = {"settings": vars(flags), "peaks": vars(peaks), "cases": results}
        write_record(flags.json, "layer", record)
    if flags.plot:
        from moe_lightning.bench import plots

        plots.save(plots.layers(results, settings), flags.plot)
