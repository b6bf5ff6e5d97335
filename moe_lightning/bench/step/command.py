"""The training step, beside that of the dense model of the same active FLOPs: `python -m moe_lightning.bench step`.

Micro-batches of real text, gradient, clipping and optimizer, as a fit runs them; eager, compiled, as CUDA graphs and
both, under the load of a router that has been trained a little and under a forced balance. docs/benchmarks.md says what
the columns mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from moe_lightning.bench.cli import Parser, check_device, check_routers
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import (
    Spread,
    medians,
    print_noise,
    sentence,
    sum_of_parts,
    total,
    with_spread,
)
from moe_lightning.bench.step.measure import (
    PARTS,
    Alone,
    Batches,
    PartTimes,
    fit_together,
    measure_alone,
    measure_parts,
    measure_rounds,
)
from moe_lightning.bench.step.models import (
    BALANCED,
    DENSE,
    FORMS,
    ROUTER,
    StepModel,
    StepSizes,
    Variant,
    text_batches,
    why_not,
)
from moe_lightning.callbacks.throughput import peak_flops
from moe_lightning.data.datamodule import LARGEST_VOCAB
from moe_lightning.data.tokenizer import ByteTokenizer
from moe_lightning.layers.recompute import Recompute
from moe_lightning.training.optimizer_step import StepPrecision
from moe_lightning.utils.checks import check_choice, check_int, check_sizes

#: By the device: of the published table on a GPU, of a few seconds on a CPU.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "d_model": 512, "n_heads": 8, "n_layers": 8, "mlp_hidden_dim": 512, "num_experts": 16, "top_k": 2,
        "seq_len": 512, "batch_size": 64, "warmup": 200, "precision": "bf16-mixed",
    },
    "cpu": {
        "d_model": 128, "n_heads": 4, "n_layers": 2, "mlp_hidden_dim": 128, "num_experts": 8, "top_k": 2,
        "seq_len": 128, "batch_size": 8, "warmup": 30, "precision": "32-true",
    },
}  # fmt: skip
_HELP = {
    "mlp_hidden_dim": "hidden size of an expert; the dense model's is top_k times that",
    "batch_size": "sequences in a micro-batch",
    "warmup": "optimizer steps of training before anything is measured",
    "precision": f"{' or '.join(get_args(StepPrecision))}",
}
LOADS = {"router": ROUTER, "balanced": BALANCED}
#: Optimizer steps whose text is used again and again.
STEPS_OF_TEXT = 4


def run(
    sizes: StepSizes,
    variants: list[Variant],
    text: Iterator[Tensor],
    warmup: int,
    rounds: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Measure all variants; `rows` in their order, `left_out` with reasons, and whether they were `together`."""
    batches = list(islice(text, STEPS_OF_TEXT * sizes.accumulate))
    again = Batches(batches, sizes.accumulate)
    kinds = [dense for dense in (False, True) if any((v.model == DENSE) == dense for v in variants)]
    task = progress.add_task("", total=len(kinds) + 2 * len(variants) + rounds * len(variants))
    models: dict[Variant, StepModel] = {}
    alone: dict[Variant, Alone] = {}
    parts: dict[Variant, PartTimes] = {}
    loads: dict[str, dict[str, float] | None] = {}
    left_out: dict[str, str] = {}
    for dense in kinds:
        progress.update(task, description="training")
        outside = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model = StepModel(dense, sizes, device)
        own = [variant for variant in variants if variant.model in model.names]
        model.train(text, warmup, own[-1].form)
        loads |= {name: model.load(name, batches) for name in dict.fromkeys(variant.model for variant in own)}
        progress.advance(task)
        for variant in own:
            progress.update(task, description=str(variant))
            one = measure_alone(model, variant, again, device, outside)
            if one.never is not None:
                left_out[str(variant)] = one.never
                continue
            alone[variant], models[variant] = one, model
            progress.advance(task)
        progress.update(task, description="parts")
        for variant in own:
            if variant not in models:
                continue
            # Kernels are the same with and without graphs, and so are their times.
            same = variant.with_graph(True), variant.with_graph(False)
            known = next((parts[other] for other in same if other in parts), None)
            parts[variant] = known or measure_parts(model, variant, again, rounds, device, alone[variant].seconds)
            progress.advance(task)
    progress.update(task, description="rounds")
    together = fit_together(alone, device)
    seconds = measure_rounds(models, alone, again, rounds, device, together, lambda: progress.advance(task))
    progress.remove_task(task)
    peak = peak_flops(device, torch.bfloat16 if sizes.precision == "bf16-mixed" else torch.float32)
    rows = [
        row(variant, sizes, models[variant], seconds, alone[variant], parts[variant], peak)
        | {"load": loads[variant.model]}
        for variant in models
    ]
    return {"rows": rows, "left_out": left_out, "together": together, "peak_flops": peak}


def row(
    variant: Variant,
    sizes: StepSizes,
    model: StepModel,
    seconds: dict[Variant, list[float]],
    alone: Alone,
    parts: PartTimes,
    peak: float,
) -> dict[str, Any]:
    """One variant: its time, rates, memory, parts, and their sum against the step; ratios are of each round."""
    ms = Spread.of([1e3 * s for s in seconds[variant]])
    dense = seconds.get(Variant(DENSE, variant.form))
    ratio = None if dense is None else Spread.of([a / b for a, b in zip(seconds[variant], dense, strict=True)])
    rate = sizes.tokens / (1e-3 * ms.median)
    gaps = ms.median - parts.whole.median if parts.without_gaps else None
    sum_us, whole_us = (spread.scaled(1e3) for spread in (total(parts.parts.values()), parts.whole))
    spreads = {"ms": ms, "x_dense": ratio, "whole_ms": parts.whole}
    return {
        "model": variant.model,
        "form": variant.form,
        "ms": ms.median,
        "tokens_per_s": rate,
        "mfu": rate * model.flops_per_token / peak,
        "x_dense": ratio and ratio.median,
        "peak_mb": None if alone.peak is None else alone.peak / 1e6,
        "kept_mb": None if alone.kept is None else alone.kept / 1e6,
        "parts_ms": medians(parts.parts),
        "whole_ms": parts.whole.median,
        "host_gaps_ms": gaps,
        "check": sum_of_parts(sum_us, whole_us),
        "spread": {**{name: s for name, s in spreads.items() if s is not None}, "parts_ms": parts.parts},
    }


def _speed_table(results: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for column in ("ms per step", "tokens/s", "MFU", "x dense", "peak GB", "kept GB", "load max/mean", "worst layer"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in results["rows"]:
        spread, load = one["spread"], one["load"]
        table.add_row(
            one["model"],
            one["form"],
            with_spread(f"{one['ms']:,.2f}", spread["ms"]),
            f"{one['tokens_per_s']:,.0f}",
            f"{one['mfu']:.1%}",
            "-" if one["x_dense"] is None else with_spread(f"{one['x_dense']:.2f}", spread["x_dense"]),
            *("-" if one[key] is None else f"{1e-3 * one[key]:,.2f}" for key in ("peak_mb", "kept_mb")),
            *("-" if load is None else f"{load[k]:.2f}" for k in ("max_over_mean", "max_over_mean_of_worst_layer")),
        )
    return table


def _parts_table(results: dict[str, Any]) -> Table:
    table = Table(title="ms per step by part, forward and backward", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("form", no_wrap=True)
    shown = [part for part in PARTS if any(part in one["parts_ms"] for one in results["rows"])]
    for column in (*shown, "host gaps"):
        table.add_column(column, justify="right")
    for one in results["rows"]:
        parts, gaps = one["parts_ms"], one["host_gaps_ms"]
        cells = ["-" if part not in parts else f"{parts[part]:,.2f}" for part in shown]
        table.add_row(one["model"], one["form"], *cells, "-" if gaps is None else f"{gaps:,.2f}")
    return table


def _print(results: dict[str, Any], title: str, console: Console) -> None:
    console.print(_speed_table(results, title))
    console.print(_parts_table(results))
    for name, reason in results["left_out"].items():
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if not results["together"]:
        console.print("the variants do not fit in memory together: each was built for its turn and freed after it")
    said = set()
    for one in results["rows"]:
        text = sentence(one["check"], "parts", "the step without clocks in it")
        if (one["model"], text) not in said:  # forms of the same kernels share their parts
            said.add((one["model"], text))
            console.print(f"{one['model']}, {one['form']}: {text}", markup=False, soft_wrap=True)
    print_noise(console, {f"{one['model']}, {one['form']}": one["spread"]["ms"] for one in results["rows"]})


def _parser() -> Parser:
    parser = Parser("step", __doc__)
    parser.add_device()
    for name, of_gpu in DEFAULTS["cuda"].items():
        default = f"default {of_gpu} on cuda, {DEFAULTS['cpu'][name]} on the CPU"
        text = f"{_HELP[name]}; {default}" if name in _HELP else default
        parser.add_argument(f"--{name}", type=type(of_gpu), help=text)
    parser.add_argument("--router", default="fused_select")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument(
        "--vocab_size", type=int, default=ByteTokenizer.vocab_size, help="of the model; the text is bytes all the same"
    )
    parser.add_argument(
        "--recompute", default="none", help=f"{', '.join(get_args(Recompute))}: what is computed again in backward"
    )
    parser.add_argument("--variants", nargs="+", default=list(FORMS), help=f"{', '.join(FORMS)}; default: all")
    parser.add_argument("--loads", nargs="+", default=list(LOADS), help=f"{', '.join(LOADS)}; default: both")
    parser.add_argument("--path", help="text to train on, a file or folder; default: Python's standard library")
    parser.add_results(rounds=9)
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, train a little, measure, print, record, draw."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    check_device(parser.component, flags.device)
    for name, value in DEFAULTS[flags.device].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    sizes = StepSizes(**{name: getattr(flags, name) for name in StepSizes.__dataclass_fields__})
    check_routers(parser.component, (sizes.router,), flags.device)
    check_choice(parser.component, "precision", sizes.precision, get_args(StepPrecision))
    check_choice(parser.component, "recompute", sizes.recompute, get_args(Recompute))
    check_int(parser.component, "vocab_size", sizes.vocab_size, ByteTokenizer.vocab_size, LARGEST_VOCAB)
    numbers = ("batch_size", "seq_len", "accumulate", "num_experts", "top_k")
    check_sizes(parser.component, rounds=flags.rounds, **{name: getattr(sizes, name) for name in numbers})
    check_int(parser.component, "warmup", flags.warmup, 0)
    for form in flags.variants:
        check_choice(parser.component, "variants", form, FORMS)
    for load in flags.loads:
        check_choice(parser.component, "loads", load, LOADS)
    device = torch.device("cuda", 0) if flags.device == "cuda" else torch.device("cpu")
    reasons = {form: why_not(form, device) for form in FORMS if form in flags.variants}
    forms = [form for form, reason in reasons.items() if reason is None]
    if not forms:
        said = "; ".join(f"{form}: {reason}" for form, reason in reasons.items())
        raise ValueError(f"{parser.component}: one of --variants must be possible here, got {said}; add eager")
    names = [*(LOADS[load] for load in LOADS if load in flags.loads), DENSE]
    variants = [Variant(name, form) for name in names for form in forms]
    console = Console(width=170)
    text = text_batches(sizes, flags.path, device)
    try:
        with Progress(console=console, transient=True) as progress:
            results = run(sizes, variants, text, flags.warmup, flags.rounds, device, progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{parser.component}: a step must fit in the GPU's memory, got {str(error).splitlines()[0]}; lower "
            "--batch_size (--accumulate keeps the tokens per step) or the model"
        ) from error
    results["left_out"] |= {form: reason for form, reason in reasons.items() if reason is not None}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    recompute = "" if sizes.recompute == "none" else f", recompute {sizes.recompute}"
    title = (
        f"d{sizes.d_model} L{sizes.n_layers} E{sizes.num_experts} K{sizes.top_k} F{sizes.mlp_hidden_dim}, "
        f"{sizes.router}, dense F{sizes.top_k * sizes.mlp_hidden_dim}\n{sizes.tokens:,} tokens per step in "
        f"{sizes.accumulate} x {sizes.batch_size} x {sizes.seq_len}, {sizes.precision}{recompute}, {where}"
    )
    _print(results, title, console)
    if flags.json:
        write_record(flags.json, "step", {"settings": vars(flags) | asdict(sizes), **results})
    if flags.plot:
        from moe_lightning.bench import plots

        plots.save(plots.steps(results["rows"], title), flags.plot)
