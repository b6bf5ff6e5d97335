"""Expert parallelism over the ranks of torchrun: rows exchanged, what that costs, what overlap hides.

    torchrun --nproc_per_node 2 -m moe_lightning.bench ep --all_routers

Every rank has --tokens tokens and its share of the experts. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lightning.bench.cli import Parser, Settings, shapes
from moe_lightning.bench.ep.link import bandwidth, link_kind
from moe_lightning.bench.ep.measure import PARTS, measure_router
from moe_lightning.bench.ep.ranks import TIMEOUT_SECONDS, ranks
from moe_lightning.bench.record import write_record
from moe_lightning.bench.roofline import Shape
from moe_lightning.bench.router.table import shape_title
from moe_lightning.bench.spread import Spread, print_noise, sentence, with_spread
from moe_lightning.expert_parallel.link import choose_chunks
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_choice, check_int

#: masked_matmul lets every expert see every token on one device: nothing of it can be spread.
EP_ROUTERS = tuple(name for name in ROUTERS if name != "masked_matmul")
WIDTH = 240  # of the tables
COLUMNS = {
    "T_select": "T_select",
    "delta_select": "delta_select",
    "T_pack": "T_pack",
    "T_counts": "T_counts",
    "T_comm": "T_comm",
    "T_comp": "T_comp",
    "T_seq": "T_seq",
    "T_overlapped": "T_overlapped",
    "eta_overlap": "eta_overlap",
    "eta_trace": "eta_trace",
    "eta_bound": "eta_bound",
    "eta_ect": "eta_ect",
    "speedup_overlap": "speedup_overlap",
    "expert load": "expert",
    "rank load": "rank",
}
MOVEMENT_COLUMNS = {
    "T_dispatch": "T_dispatch",
    "graph": "T_dispatch_graph",
    "T_all_to_all": "T_all_to_all",
    "beyond it": "beyond_all_to_all",
    "T_combine": "T_combine",
    "graph ": "T_combine_graph",
    "T_layer": "T_layer",
    "eta_overlap": "eta_overlap",
    "eta_ect": "eta_ect",
}
SKEW_COLUMNS = ("T_comm", "T_comp", "T_seq", "T_overlapped")


def _parser() -> Parser:
    parser = Parser("ep", __doc__)
    parser.add_routers(EP_ROUTERS, "fused_select", "fp16")
    parser.add_layer()
    parser.add_argument(
        "--dispatch",
        help="nccl or gloo, by default that of the device; symmetric: also writing to other ranks' memory",
    )
    parser.add_argument("--overlap_chunks", nargs="+", default=["1", "2"], help="several values are swept; or auto")
    parser.add_argument("--backward", action="store_true", help="the layer forward and backward")
    parser.add_argument(
        "--skew_sweep", type=float, nargs="+", default=[], metavar="BIAS", help="the first router under each bias too"
    )
    parser.add_results(rounds=15)
    parser.add_trace()
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure; rank zero prints, records, draws."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    settings = parser.settings(flags, flags.backward)
    flags.overlap_chunks = [_chunks(value) for value in flags.overlap_chunks]
    _check_ranks(flags, settings)
    shape = shapes("bench.ep", settings, vars(flags))[0]
    with ranks("bench.ep", "nccl" if flags.device == "cuda" else "gloo", flags.device) as device:
        world, leads = dist.get_world_size(), dist.get_rank() == 0
        if world < 2 or flags.num_experts % world:
            raise ValueError(
                f"bench.ep: num_experts must be a multiple of the ranks, of which there are at least 2, got "
                f"num_experts={flags.num_experts}, ranks={world}; change --num_experts or --nproc_per_node"
            )
        console = Console(width=WIDTH, quiet=not leads)
        swept = [choose_chunks(dist.group.WORLD, device) if c == "auto" else c for c in flags.overlap_chunks]  # type: ignore[arg-type]
        swept = list(dict.fromkeys(swept))
        rows_bytes = shape.slots // world * (world - 1) * shape.d_model * shape.size
        link = {"kind": link_kind(device), "ranks": world, **bandwidth(rows_bytes, settings.rounds, device)}
        runs = [(chunks, router) for chunks in swept for router in settings.routers]
        cases = []
        memory = None
        if flags.dispatch == "symmetric":
            memory = SymmetricMemory.create(dist.group.WORLD, device, TIMEOUT_SECONDS)  # type: ignore[arg-type]
        for chunks, router in track(runs, "routers", console=console, transient=True):
            with_memory = memory if chunks == swept[0] else None
            case = measure_router(router, shape, settings, chunks, device, with_memory, flags.trace)
            cases.append({"chunks": chunks, **case})
        skewed = sweep(flags.skew_sweep, shape, settings, swept[0], device, memory, console)
    title = f"{shape_title(vars(flags))}, {settings.dtype_name}, {world} ranks"
    for chunks in swept:
        console.print(_table([row for row in cases if row["chunks"] == chunks], chunks, title, settings))
    console.print(movement_table(cases, flags.dispatch, settings.backward))
    if skewed:
        console.print(skew_table(skewed))
    console.print(
        f"link: {link['kind']}, {link['gb_per_s']:,.1f} GB/s per direction at {link['bytes'] / 1e6:,.1f} MB; "
        "times in us of the slowest rank, ±: half the distance of the quartiles over the rounds; skew as max/mean, CV"
    )
    if swept == [1]:
        console.print("overlap was not measured: with one chunk exchanges are blocking; give --overlap_chunks 2 4")
    print_noise(console, _spreads(cases + skewed))
    if flags.trace:
        console.print(f"traces: {flags.trace}, a file per rank and layer; open them at https://ui.perfetto.dev")
    if leads and flags.json:
        write_record(flags.json, "ep", {"settings": vars(flags), "link": link, "cases": cases, "skewed": skewed})
    if leads and flags.plot:
        from moe_lightning.bench import plots

        plots.save(plots.overlap(cases, skewed, link, title), flags.plot)


def _chunks(value: str) -> int | str:
    try:
        return int(value)
    except ValueError:
        if value == "auto":
            return value
        raise ValueError(f"bench.ep: overlap_chunks must be integers or auto, got {value!r}") from None


def _check_ranks(flags: argparse.Namespace, settings: Settings) -> None:
    flags.dispatch = flags.dispatch or ("nccl" if flags.device == "cuda" else "gloo")
    check_choice("bench.ep", "dispatch", flags.dispatch, ("nccl", "gloo", "symmetric"))
    if flags.dispatch == "nccl" and flags.device == "cpu":
        raise ValueError("bench.ep: --dispatch nccl needs --device cuda, got cpu; use --dispatch gloo")
    if flags.dispatch == "gloo" and flags.device == "cuda":
        raise ValueError("bench.ep: --dispatch gloo needs --device cpu, got cuda; use --dispatch nccl")
    for chunks in flags.overlap_chunks:
        if chunks != "auto":
            check_int("bench.ep", "overlap_chunks", chunks, 1)
    for bias in flags.skew_sweep:
        if not math.isfinite(bias):
            raise ValueError(f"bench.ep: skew_sweep must be finite, got {bias}; give logits such as 0 1 2 4")
    if "masked_matmul" in settings.routers:
        raise ValueError(
            "bench.ep: masked_matmul lets every expert see every token on one device, got --routers masked_matmul; "
            f"choose from {', '.join(EP_ROUTERS)}"
        )


def _spreads(rows: list[dict[str, Any]]) -> dict[str, Spread]:
    """Of all times, by name."""
    spreads: dict[str, Spread] = {}
    for row in rows:
        bias = f", bias {row['skew_bias']:g}" if "skew_bias" in row else ""
        head = f"{row['router']}, {row['chunks']} chunks{bias}"
        for by, times in (("", row), (" symmetric", row.get("symmetric", {"spread": {}}))):
            spreads |= {f"{head}{by} {name}": value for name, value in times["spread"].items()}
    return spreads


def _table(rows: list[dict[str, Any]], chunks: int, title: str, settings: Settings) -> Table:
    what = "forward + backward (T_select, T_pack and T_counts: forward)" if settings.backward else "forward"
    checks = (f"{row['router']}: {sentence(row['sum_of_parts'], ' + '.join(PARTS), 'T_seq')}" for row in rows)
    table = Table(
        title=f"{title}, {what}, {chunks} chunk{'s' if chunks > 1 else ''}",
        caption="\n".join(checks),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("router", no_wrap=True)
    columns = {name: key for name, key in COLUMNS.items() if key != "eta_trace" or key in rows[0]}
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["router"], *(_cell(row, key) for key in columns.values()))
    return table


def _cell(row: dict[str, Any], key: str) -> str:
    if key in ("expert", "rank"):
        return f"{row[f'{key}_max_over_mean']:.2f}, {row[f'{key}_cv']:.2f}"
    value = row[key]
    if value is None:
        return "-"
    text = f"{value:,.0f}" if key.startswith(("T_", "delta")) and abs(value) >= 100 else f"{value:.2f}"
    return with_spread(text, row["spread"].get(key))


def movement_table(cases: list[dict[str, Any]], dispatch: str, backward: bool) -> Table:
    """Two lines per case that was measured both ways."""
    title = "dispatch and combine alone, forward"
    table = Table(title=f"{title}; T_layer: forward + backward" if backward else title, title_justify="left")
    for column in ("rows of", "chunks", "by"):
        table.add_column(column, no_wrap=True)
    for column in MOVEMENT_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in cases:
        exchange = "exchanges" if dispatch == "symmetric" else dispatch
        layer = {"T_layer": row["spread"]["T_overlapped"]}
        exchanged = {**row, "T_layer": row["T_overlapped"], "spread": row["spread"] | layer}
        for by, times in ((exchange, exchanged), ("symmetric", row.get("symmetric"))):
            if times is not None:
                cells = (
                    with_spread(_movement_cell(key, times.get(key)), times["spread"].get(key))
                    for key in MOVEMENT_COLUMNS.values()
                )
                table.add_row(row["router"], str(row["chunks"]), by, *cells)
    return table


def _movement_cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if key.startswith("eta") else f"{value:,.1f}"


def sweep(
    biases: list[float],
    shape: Shape,
    settings: Settings,
    chunks: int,
    device: torch.device,
    memory: SymmetricMemory | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Rows of the first router, one per bias on `skew_experts` experts (an eighth of them if it is 0)."""
    router, experts = settings.routers[0], settings.skew_experts or max(1, shape.num_experts // 8)
    cases = []
    for bias in track(biases, "skew", console=console, transient=True):
        skewed = replace(settings, skew_experts=experts, skew_bias=bias)
        case = measure_router(router, shape, skewed, chunks, device, memory)
        cases.append({"skew_experts": experts, "skew_bias": bias, "chunks": chunks, **case})
    return cases


def skew_table(cases: list[dict[str, Any]]) -> Table:
    """Latency against skew."""
    first = cases[0]
    result = Table(
        title=f"{first['router']} with a bias on the first {first['skew_experts']} experts", title_justify="left"
    )
    for column in ("bias", "expert load", "rank load", *SKEW_COLUMNS, "comm share", "symmetric"):
        result.add_column(column, justify="right")
    for row in cases:
        symmetric = row.get("symmetric")
        result.add_row(
            f"{row['skew_bias']:g}",
            *(f"{row[f'{whose}_max_over_mean']:.2f}, {row[f'{whose}_cv']:.2f}" for whose in ("expert", "rank")),
            *(with_spread(f"{row[key]:,.0f}", row["spread"][key]) for key in SKEW_COLUMNS),
            f"{row['comm_share']:.0%}",
            "-" if symmetric is None else with_spread(f"{symmetric['T_layer']:,.0f}", symmetric["spread"]["T_layer"]),
        )
    return result
