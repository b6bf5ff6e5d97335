"""What routing costs: `python -m moe_lightning.bench router`.

Several values of --tokens, --d_model, --experts, --top_k or --strategy are swept: a table for each combination.
docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from moe_lightning.bench import plots
from moe_lightning.bench.cli import Parser, Settings, measured_ceilings, shapes
from moe_lightning.bench.commands.trace import record
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.record import write_record
from moe_lightning.bench.roofline import Ceilings, Shape
from moe_lightning.bench.router import crossover, perm_sweep
from moe_lightning.bench.router.case import Case, build_cases
from moe_lightning.bench.router.measure import measure
from moe_lightning.bench.router.table import direction_spreads, direction_table
from moe_lightning.bench.spread import print_noise
from moe_lightning.bench.timers import keep_freed_memory, threads
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_int

WIDTH = 140  # of a table, where the terminal is narrower or there is none


def _parser() -> Parser:
    parser = Parser("router", __doc__)
    parser.add_routers(ROUTERS, "naive_topk", "fp16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--d_model", type=int, nargs="+", default=[4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[64])
    parser.add_argument("--top_k", type=int, nargs="+", default=[2])
    parser.add_argument("--hidden_dim", type=int, default=2048, help="of an expert")
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
    plots.check_path("bench.router", flags.plot)
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
            results, figure = (perm_sweep.run if flags.perm_sweep else _routes)(flags, settings, console)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"bench.router: everything must fit in GPU memory, got {str(error).splitlines()[0]}; "
            "lower --tokens or --d_model, or give fewer --strategy"
        ) from error
    if flags.json:
        write_record(flags.json, "router", {"settings": vars(flags), **results})
    if flags.plot:
        plots.save(figure, flags.plot)


def _routes(flags: argparse.Namespace, settings: Settings, console: Console) -> tuple[dict[str, Any], Any]:
    swept = shapes("bench.router", flags.tokens, flags.d_model, flags.experts, flags.top_k, flags.hidden_dim, settings)
    ceilings = measured_ceilings(settings, console)
    results, crossings = [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("shapes", total=len(swept))
        for shape in swept:
            found = measure(shape, settings, ceilings, progress)
            for direction in ("forward", "backward") if settings.backward else ("forward",):
                console.print(direction_table(found, direction, settings))
                print_noise(console, direction_spreads(found, direction))
            if "masked_matmul" in settings.strategies:
                crossing = crossover.measure(shape, settings, ceilings, progress)
                crossover.show(crossing, console)
                crossings.append(crossing)
            if flags.trace:
                for line in write_traces(shape, settings, ceilings, flags.trace, progress):
                    console.print(line, soft_wrap=True)
            results += found
            progress.advance(task)
    record = {"ceilings": vars(ceilings), "cases": results, "crossovers": crossings}
    return record, plots.routes(results, settings)


def write_traces(
    shape: Shape, settings: Settings, ceilings: Ceilings, folder: str, progress: Progress
) -> Iterator[str]:
    """A line for each strategy: its file, or why there is none."""
    stream = side_stream(settings.device) if settings.device.type == "cuda" else nullcontext()
    with stream:
        cases = build_cases(settings.strategies, shape, settings, ceilings)
        for name, case in progress.track(cases.items(), description="traces"):
            if case.without_layer is not None:
                yield f"trace: {name}: none, as {case.without_layer}"
            else:
                call = partial(_call, case, settings.backward)
                yield f"trace: {name}: {record(call, [case.moe], settings.device, folder, name)}"


def _call(case: Case, backward: bool) -> Any:
    if not backward:
        with torch.no_grad():
            return case.moe(case.x_TD)[0]
    y_TD = case.moe(case.x_TD)[0]
    return torch.autograd.grad(y_TD, (case.x_TD, *case.moe.parameters()), torch.ones_like(y_TD), allow_unused=True)
