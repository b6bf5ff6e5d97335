"""What routing costs: `python -m moe_lightning.bench router`.

Several values of --tokens, --d_model, --experts, --top_k or --strategy are swept: a table for each combination.
docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress

from moe_lightning.bench.record import write_record
from moe_lightning.bench.router import crossover, perm_sweep, plots
from moe_lightning.bench.router.ceilings import measured_ceilings
from moe_lightning.bench.router.cpu_timing import keep_freed_memory, threads
from moe_lightning.bench.router.measure import measure
from moe_lightning.bench.router.settings import (
    DTYPES,
    Settings,
    check_device,
    check_settings,
    check_strategies,
    shapes,
)
from moe_lightning.bench.router.table import direction_table
from moe_lightning.checks import check_choice, check_int
from moe_lightning.routers import ROUTERS

WIDTH = 140  # of a table, where the terminal is narrower or there is none


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        raise ValueError(f"bench.router: {message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m moe_lightning.bench router", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", help="fp16, bf16 or fp32; default fp16 on cuda, fp32 on the CPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--d_model", type=int, nargs="+", default=[4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[64])
    parser.add_argument("--top_k", type=int, nargs="+", default=[2])
    parser.add_argument("--hidden_dim", type=int, default=2048, help="of an expert")
    parser.add_argument("--strategy", nargs="+", default=["naive_topk"], help=", ".join(ROUTERS))
    parser.add_argument("--all_strategies", action="store_true")
    parser.add_argument("--sinkhorn_iters", type=int, default=10)
    parser.add_argument("--sinkhorn_temperature", type=float, default=1.0)
    parser.add_argument("--skew_experts", type=int, default=0, help="this many experts get --skew_bias")
    parser.add_argument("--skew_bias", type=float, default=2.0, help="in logits")
    parser.add_argument("--backward", action="store_true", help="the backward pass too")
    parser.add_argument("--rounds", type=int, default=25, help="turns that each call takes; medians are over these")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", metavar="FILE", help="write the results as a record")
    parser.add_argument("--plot", metavar="FILE", help="draw them (.png, .svg, .pdf)")
    parser.add_argument("--perm_sweep", action="store_true", help="measure the permutation alone, over batch sizes")
    parser.add_argument("--seq_len", type=int, default=128, help="of --perm_sweep")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of --perm_sweep")
    parser.add_argument("--csv", metavar="FILE", help="write the rows of --perm_sweep")
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record, draw."""
    flags = _parser().parse_args(arguments)
    plots.check_path(flags.plot)
    if flags.csv and not flags.perm_sweep:
        raise ValueError("bench.router: --csv holds the rows of --perm_sweep, got --csv alone; add it, or use --json")
    settings = _settings(flags)
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


def _settings(flags: argparse.Namespace) -> Settings:
    check_device(flags.device)
    flags.dtype = flags.dtype or ("fp16" if flags.device == "cuda" else "fp32")
    check_choice("bench.router", "dtype", flags.dtype, DTYPES)
    strategies = tuple(ROUTERS) if flags.all_strategies else tuple(dict.fromkeys(flags.strategy))
    check_strategies(strategies, flags.device)
    settings = Settings(
        device=torch.device(flags.device, 0) if flags.device == "cuda" else torch.device("cpu"),
        dtype=DTYPES[flags.dtype],
        strategies=strategies,
        backward=flags.backward,
        sinkhorn_iters=flags.sinkhorn_iters,
        sinkhorn_temperature=flags.sinkhorn_temperature,
        skew_experts=flags.skew_experts,
        skew_bias=flags.skew_bias,
        rounds=flags.rounds,
    )
    check_settings(settings)
    check_int("bench.router", "threads", flags.threads, 1, 1024)
    return settings


def _routes(flags: argparse.Namespace, settings: Settings, console: Console) -> tuple[dict[str, Any], Any]:
    swept = shapes(flags.tokens, flags.d_model, flags.experts, flags.top_k, flags.hidden_dim, settings)
    ceilings = measured_ceilings(settings, console)
    results, crossings = [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("shapes", total=len(swept))
        for shape in swept:
            found = measure(shape, settings, ceilings, progress)
            for direction in ("forward", "backward") if settings.backward else ("forward",):
                console.print(direction_table(found, direction, settings))
            if "masked_matmul" in settings.strategies:
                crossing = crossover.measure(shape, settings, ceilings, progress)
                crossover.show(crossing, console)
                crossings.append(crossing)
            results += found
            progress.advance(task)
    record = {"ceilings": dataclasses.asdict(ceilings), "cases": results, "crossovers": crossings}
    return record, plots.routes(results, settings)
