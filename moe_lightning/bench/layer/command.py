"""The whole MoE layer, forward and forward + backward: `python -m moe_lightning.bench layer`.

Every experts implementation and router asked for, and other people's layers where they are installed, on the same
weights and tokens, in turn. Forward is without gradient. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_lightning.bench.layer import plots
from moe_lightning.bench.layer.measure import AGREES, DIRECTIONS, floors_ms, measure
from moe_lightning.bench.layer.variants import IMPLEMENTATIONS, available, build
from moe_lightning.bench.record import write_record
from moe_lightning.bench.router.accounting import Shape
from moe_lightning.bench.router.ceilings import measured_ceilings
from moe_lightning.bench.router.gpu_timing import side_stream
from moe_lightning.bench.router.settings import (
    DTYPES,
    Settings,
    check_device,
    check_settings,
    check_strategies,
    shapes,
)
from moe_lightning.bench.router.table import shape_title
from moe_lightning.checks import check_choice
from moe_lightning.routers import ROUTERS

#: tokens, d_model, hidden_dim, experts, top_k of models that people train.
PUBLISHED = (
    (4096, 4096, 2048, 64, 2),
    (4096, 4096, 14336, 8, 2),
    (32768, 2048, 768, 128, 8),
    (16384, 4096, 1024, 64, 8),
    (4096, 4096, 11008, 64, 2),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        raise ValueError(f"bench.layer: {message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m moe_lightning.bench layer", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", help="fp16, bf16 or fp32; default bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d_model", type=int, default=4096)
    parser.add_argument("--hidden_dim", type=int, default=2048, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--published", action="store_true", help="the five sizes of the published table instead")
    parser.add_argument("--strategy", nargs="+", default=["fused_select"], help=", ".join(ROUTERS))
    parser.add_argument("--all_strategies", action="store_true")
    parser.add_argument(
        "--implementation", nargs="+", help=f"{', '.join(IMPLEMENTATIONS)}; default all that can be had"
    )
    parser.add_argument("--no_peers", action="store_true", help="leave out other people's layers")
    parser.add_argument("--sinkhorn_iters", type=int, default=10)
    parser.add_argument("--sinkhorn_temperature", type=float, default=1.0)
    parser.add_argument("--skew_experts", type=int, default=0, help="this many experts get --skew_bias")
    parser.add_argument("--skew_bias", type=float, default=2.0, help="in logits")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each layer takes; medians are over these")
    parser.add_argument("--json", metavar="FILE", help="write the results as a record")
    parser.add_argument("--plot", metavar="FILE", help="draw them (.png, .svg, .pdf)")
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record, draw."""
    flags = _parser().parse_args(arguments)
    plots.check_path(flags.plot)
    settings = _settings(flags)
    implementations = list(dict.fromkeys(flags.implementation or IMPLEMENTATIONS))
    for name in implementations:
        check_choice("bench.layer", "implementation", name, IMPLEMENTATIONS)
    sizes = (
        PUBLISHED if flags.published else ((flags.tokens, flags.d_model, flags.hidden_dim, flags.experts, flags.top_k),)
    )
    swept = [shapes([t], [d], [e], [k], f, settings)[0] for t, d, f, e, k in sizes]
    if flags.implementation:
        for name, reason in available(implementations, swept[0], settings).items():
            if reason:
                raise ValueError(f"bench.layer: --implementation {name} is not possible: {reason}")
    console = Console(width=150)
    ceilings = measured_ceilings(settings, console)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("shapes", total=len(swept))
        for shape in swept:
            results.append(_one(shape, settings, implementations, not flags.no_peers, ceilings, progress))
            console.print(_table(results[-1], settings))
            progress.advance(task)
    if flags.json:
        record = {"settings": vars(flags), "ceilings": dataclasses.asdict(ceilings), "cases": results}
        write_record(flags.json, "layer", record)
    if flags.plot:
        plots.save(plots.layers(results, settings), flags.plot)


def _settings(flags: argparse.Namespace) -> Settings:
    check_device(flags.device)
    flags.dtype = flags.dtype or ("bf16" if flags.device == "cuda" else "fp32")
    check_choice("bench.layer", "dtype", flags.dtype, DTYPES)
    strategies = tuple(ROUTERS) if flags.all_strategies else tuple(dict.fromkeys(flags.strategy))
    check_strategies(strategies, flags.device)
    settings = Settings(
        device=torch.device(flags.device, 0) if flags.device == "cuda" else torch.device("cpu"),
        dtype=DTYPES[flags.dtype],
        strategies=strategies,
        backward=True,
        sinkhorn_iters=flags.sinkhorn_iters,
        sinkhorn_temperature=flags.sinkhorn_temperature,
        skew_experts=flags.skew_experts,
        skew_bias=flags.skew_bias,
        rounds=flags.rounds,
    )
    check_settings(settings)
    return settings


def _one(
    shape: Shape, settings: Settings, implementations: list[str], with_peers: bool, ceilings: Any, progress: Progress
) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        work = build(shape, settings, implementations, with_peers, ceilings)
        return {
            **dataclasses.asdict(shape),
            "load": work.load,
            "left_out": work.left_out,
            "floor_ms": floors_ms(shape, ceilings),
            "rows": measure(work, shape, ceilings, settings.rounds, progress),
        }

    if settings.device.type == "cpu":
        return run()
    with side_stream(settings.device):
        return run()


def _table(result: dict[str, Any], settings: Settings) -> Table:
    load = result["load"]
    captions = [f"left out: {name}, {reason}" for name, reason in result["left_out"].items()]
    for row in result["rows"]:
        if not row["distance"] <= AGREES:
            captions.append(f"{row['variant']}: its output is {row['distance']:.1%} away from {row['compared_with']}")
    floors = ", ".join(f"{direction} {ms:.2f} ms" for direction, ms in result["floor_ms"].items())
    table = Table(
        title=f"{shape_title(result)}, {settings.dtype_name}, {settings.device_name}\n"
        f"load max/mean {load['max_over_mean']:.2f}, CV {load['cv']:.2f}; floors: {floors}",
        caption="\n".join(captions) or None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for direction in DIRECTIONS:
        for column in (f"{direction} ms", "TFLOP/s", "x floor"):
            table.add_column(column, justify="right")
    for column in ("kept MB", "peak MB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        cells = []
        for direction in DIRECTIONS:
            part = row[direction]
            cells += [f"{part['ms']:,.2f}", f"{part['tflops']:,.3g}", f"{part['x_floor']:.2f}"]
        cells += ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("kept_mb", "peak_mb")]
        table.add_row(row["variant"], *cells)
    return table
