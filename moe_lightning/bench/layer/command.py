"""The whole MoE layer, forward and forward + backward: `python -m moe_lightning.bench layer`.

Every experts implementation and router asked for, and other people's layers where they are installed, on the same
weights and tokens, in turn. Forward is without gradient. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_lightning.bench.accounting import Shape
from moe_lightning.bench.ceilings import measured_ceilings
from moe_lightning.bench.flags import Parser
from moe_lightning.bench.gpu_timing import side_stream
from moe_lightning.bench.layer import plots
from moe_lightning.bench.layer.measure import AGREES, DIRECTIONS, floors_ms, measure, trace
from moe_lightning.bench.layer.peers import PEERS
from moe_lightning.bench.layer.variants import IMPLEMENTATIONS, Also, available, build
from moe_lightning.bench.pictures import check_path, save
from moe_lightning.bench.record import write_record
from moe_lightning.bench.router.table import shape_title
from moe_lightning.bench.settings import DTYPES, Settings, shapes
from moe_lightning.bench.spread import print_noise, with_spread
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_choice, check_int

#: tokens, d_model, hidden_dim, experts, top_k of models that people train.
PUBLISHED = (
    (4096, 4096, 2048, 64, 2),
    (4096, 4096, 14336, 8, 2),
    (32768, 2048, 768, 128, 8),
    (16384, 4096, 1024, 64, 8),
    (4096, 4096, 11008, 64, 2),
)


def _parser() -> Parser:
    parser = Parser("layer", __doc__)
    parser.add_routers(ROUTERS, "fused_select", "bf16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d_model", type=int, default=4096)
    parser.add_argument("--hidden_dim", type=int, default=2048, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--published", action="store_true", help="the five sizes of the published table instead")
    parser.add_argument("--implementation", nargs="+", help=f"{', '.join(IMPLEMENTATIONS)}; default: all there are")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="other people's layers; default: all installed")
    parser.add_argument("--also_dtype", help="the first layer once more, in this dtype")
    parser.add_argument("--also_skew_experts", type=int, default=0, help="and with this many experts biased")
    parser.add_results(rounds=15)
    parser.add_trace()
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record, draw."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    check_path("bench.layer", flags.plot)
    settings = parser.settings(flags, backward=True)
    implementations = list(dict.fromkeys(flags.implementation or IMPLEMENTATIONS))
    for name in implementations:
        check_choice("bench.layer", "implementation", name, IMPLEMENTATIONS)
    for name in flags.peers:
        check_choice("bench.layer", "peers", name, PEERS)
    if flags.also_dtype:
        check_choice("bench.layer", "also_dtype", flags.also_dtype, DTYPES)
    sizes = (
        PUBLISHED if flags.published else ((flags.tokens, flags.d_model, flags.hidden_dim, flags.experts, flags.top_k),)
    )
    check_int("bench.layer", "also_skew_experts", flags.also_skew_experts, 0, min(size[3] for size in sizes))
    also = Also(DTYPES.get(flags.also_dtype), flags.also_skew_experts)
    swept = [shapes("bench.layer", [t], [d], [e], [k], f, settings)[0] for t, d, f, e, k in sizes]
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
            results.append(_one(shape, settings, implementations, flags.peers, also, ceilings, progress, flags.trace))
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
        record = {"settings": vars(flags), "ceilings": vars(ceilings), "cases": results}
        write_record(flags.json, "layer", record)
    if flags.plot:
        save(plots.layers(results, settings), flags.plot)


def _one(
    shape: Shape,
    settings: Settings,
    implementations: list[str],
    peers: list[str],
    also: Also,
    ceilings: Any,
    progress: Progress,
    trace_folder: str | None,
) -> dict[str, Any]:
    stream = side_stream(settings.device) if settings.device.type == "cuda" else nullcontext()
    with stream:
        work = build(shape, settings, implementations, peers, ceilings, also)
        return {
            **dataclasses.asdict(shape),
            "load": work.load,
            "left_out": work.left_out,
            "floor_ms": floors_ms(shape, ceilings),
            "rows": measure(work, shape, ceilings, settings.rounds, progress),
            "traces": trace(work, trace_folder, progress) if trace_folder is not None else {},
        }


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
            ms = with_spread(f"{part['ms']:,.2f}", part["spread"]["ms"])
            cells += [ms, f"{part['tflops']:,.3g}", f"{part['x_floor']:.2f}"]
        cells += ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("kept_mb", "peak_mb")]
        table.add_row(row["variant"], *cells)
    return table
