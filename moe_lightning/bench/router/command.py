"""What routing costs: `python -m moe_lightning.bench router`.

Several values of --tokens, --d_model, --num_experts, --top_k or --routers are swept: a table for each combination.
docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from moe_lightning.bench.calls import differentiable
from moe_lightning.bench.cli import Parser, Settings, measured_peaks, shapes
from moe_lightning.bench.commands.trace import record_trace
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.record import write_record
from moe_lightning.bench.roofline import Peaks, Shape
from moe_lightning.bench.router import crossover, perm_sweep
from moe_lightning.bench.router.case import Case, build_cases
from moe_lightning.bench.router.measure import measure
from moe_lightning.bench.router.table import direction_spreads, direction_table
from moe_lightning.bench.spread import print_noise
from moe_lightning.bench.timers import keep_freed_memory, threads
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_int

WIDTH = 155  # of a table, where the terminal is narrower or there is none


def _parser() -> Parser:
    parser = Parser("router", __doc__)
    parser.add_routers(ROUTERS, "naive_topk", "fp16")
    parser.add_layer(several=True)
    parser.add_argument("--backward", action="store_true", help="the backward pass too")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_results(rounds=25)
    parser.add_trace()
    parser.add_argument("--perm_sweep", action="store_true", help="measure the permutation alone, over batch sizes")
    parser.add_argument("--seq_len", type=int, default=128, help="of --perm_sweep")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of --perm_sweep")
    parser.add_argument("--csv", metavar="FILE", help="write the rows of --perm_sweep")
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record, draw."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.csv and not flags.perm_sweep:
        raise ValueError("bench.router: --csv holds the rows of --perm_sweep, got --csv alone; add it, or use --json")
    if flags.trace and flags.perm_sweep:
        raise ValueError("bench.router: --trace is of whole layers, got --perm_sweep too; leave one out")
    settings = parser.settings(flags, flags.backward)
    check_int("bench.router", "threads", flags.threads, 1, 1024)
    console = Console()
    console = console if console.width >= WIDTH else Console(width=WIDTH)
    if settings.device.type == "cpu":
        keep_freed_memory()
    try:
        with threads(flags.threads):
            results = (perm_sweep.run if flags.perm_sweep else _routes)(flags, settings, console)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"bench.router: everything must fit in GPU memory, got {str(error).splitlines()[0]}; "
            "lower --tokens or --d_model, or give fewer --routers"
        ) from error
    if flags.json:
        write_record(flags.json, "router", {"settings": vars(flags), **results})
    if flags.plot:
        from moe_lightning.bench import plots

        draw, rows = (plots.permutation, "perm_sweep") if flags.perm_sweep else (plots.routes, "cases")
        with threads(flags.threads):  # the title says how many
            plots.save(draw(results[rows], settings), flags.plot)


def _routes(flags: argparse.Namespace, settings: Settings, console: Console) -> dict[str, Any]:
    swept = shapes("bench.router", settings, vars(flags))
    peaks = measured_peaks(settings, console)
    results, crossings = [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("shapes", total=len(swept))
        for shape in swept:
            cases = measure(shape, settings, peaks, progress)
            for direction in ("forward", "backward") if settings.backward else ("forward",):
                console.print(direction_table(cases, direction, settings))
                print_noise(console, direction_spreads(cases, direction))
            if "masked_matmul" in settings.routers:
                crossing = crossover.measure(shape, settings, peaks, progress)
                crossover.show(crossing, console)
                crossings.append(crossing)
            if flags.trace:
                for line in write_traces(shape, settings, peaks, flags.trace, progress):
                    console.print(line, soft_wrap=True)
            results += cases
            progress.advance(task)
    return {"peaks": vars(peaks), "cases": results, "crossovers": crossings}


def write_traces(shape: Shape, settings: Settings, peaks: Peaks, folder: str, progress: Progress) -> Iterator[str]:
    """A line for each router: its file, or why there is none."""
    with side_stream(settings.device):
        cases = build_cases(settings.routers, shape, settings, peaks)
        for name, case in progress.track(cases.items(), description="traces"):
            if case.without_layer is not None:
                yield f"trace: {name}: none, as {case.without_layer}"
            else:
                call = partial(_call, case, settings.backward)
                yield f"trace: {name}: {record_trace(call, [case.moe], settings.device, folder, name)}"


def _call(case: Case, backward: bool) -> Any:
    if not backward:
        with torch.no_grad():
            return case.moe(case.x_TD)[0]
    y_TD = case.moe(case.x_TD)[0]
    return torch.autograd.grad(y_TD, (case.x_TD, *differentiable(case.moe)), torch.ones_like(y_TD), allow_unused=True)
