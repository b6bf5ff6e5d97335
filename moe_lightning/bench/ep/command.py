"""Expert parallelism over the ranks of torchrun: what travels, what it costs, what overlap hides.

    torchrun --nproc_per_node 2 -m moe_lightning.bench ep --all_strategies

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

from moe_lightning.bench import plots
from moe_lightning.bench.cli import Parser, Settings, shapes
from moe_lightning.bench.ep import link
from moe_lightning.bench.ep.measure import PARTS, measure_strategy
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
STRATEGIES = tuple(name for name in ROUTERS if name != "masked_matmul")
WIDTH = 200  # of the tables
COLUMNS = {
    "T_select": "T_select",
    "Δ to naive": "delta_select",
    "T_pack": "T_pack",
    "T_counts": "T_counts",
    "T_comm": "T_comm",
    "T_comp": "T_comp",
    "T_seq": "T_seq",
    "overlapped": "T_overlapped",
    "eta": "eta_overlap",
    "eta_trace": "eta_trace",
    "bound": "eta_bound",
    "eta_ect": "eta_ect",
    "speed-up": "speedup_overlap",
    "experts": "expert",
    "ranks": "rank",
}
MOVEMENT_COLUMNS = {
    "gather + dispatch": "T_dispatch",
    "graph": "T_dispatch_graph",
    "all_to_all alone": "T_all_to_all",
    "beyond it": "beyond_all_to_all",
    "combine": "T_combine",
    "combine graph": "T_combine_graph",
    "layer": "T_layer",
    "eta": "eta_overlap",
    "eta_ect": "eta_ect",
}
SKEW_COLUMNS = ("T_comm", "T_comp", "T_seq", "T_overlapped")


def _parser() -> Parser:
    parser = Parser("ep", __doc__)
    parser.add_routers(STRATEGIES, "fused_select", "fp16")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--d_model", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=2048, help="hidden size of an expert")
    parser.add_argument("--experts", type=int, default=64, help="over all ranks")
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument(
        "--dispatch", help="nccl or gloo, by default that of the device; symmetric: beside it, in one kernel"
    )
    parser.add_argument("--overlap_chunks", nargs="+", default=["1", "2"], help="several values are swept; or auto")
    parser.add_argument("--backward", action="store_true", help="the layer forward and backward")
    parser.add_argument(
        "--skew_sweep", type=float, nargs="+", default=[], metavar="BIAS", help="the first strategy under each bias too"
    )
    parser.add_results(rounds=15)
    parser.add_trace()
    return parser


def main(arguments: list[str]) -> None:
    """Parse flags, measure; rank zero prints, records, draws."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    plots.check_path("bench.ep", flags.plot)
    settings = parser.settings(flags, flags.backward)
    flags.overlap_chunks = [_chunks(value) for value in flags.overlap_chunks]
    _check_ranks(flags, settings)
    shape = shapes("bench.ep", [flags.tokens], [flags.d_model], [flags.experts], [flags.top_k], flags.ffn, settings)[0]
    with ranks("bench.ep", "nccl" if flags.device == "cuda" else "gloo", flags.device) as device:
        world, leads = dist.get_world_size(), dist.get_rank() == 0
        if world < 2 or flags.experts % world:
            raise ValueError(
                f"bench.ep: experts must be a multiple of the ranks, of which there are at least 2, got "
                f"experts={flags.experts}, ranks={world}; change --experts or --nproc_per_node"
            )
        console = Console(width=WIDTH, quiet=not leads)
        swept = [choose_chunks(dist.group.WORLD, device) if c == "auto" else c for c in flags.overlap_chunks]  # type: ignore[arg-type]
        swept = list(dict.fromkeys(swept))
        rows_bytes = shape.slots // world * (world - 1) * shape.d_model * shape.size
        join = {"kind": link.link_kind(device), "ranks": world, **link.bandwidth(rows_bytes, settings.rounds, device)}
        runs = [(chunks, strategy) for chunks in swept for strategy in settings.strategies]
        found = []
        memory = None
        if flags.dispatch == "symmetric":
            memory = SymmetricMemory.create(dist.group.WORLD, device, TIMEOUT_SECONDS)  # type: ignore[arg-type]
        for chunks, strategy in track(runs, "strategies", console=console, transient=True):
            beside = memory if chunks == swept[0] else None
            case = measure_strategy(strategy, shape, settings, chunks, device, beside, flags.trace)
            found.append({"chunks": chunks, **case})
        skewed = sweep(flags.skew_sweep, shape, settings, swept[0], device, memory, console)
    title = f"{shape_title(vars(flags) | {'hidden_dim': flags.ffn})}, {settings.dtype_name}, {world} ranks"
    for chunks in swept:
        console.print(_table([row for row in found if row["chunks"] == chunks], chunks, title, settings))
    console.print(movement_table(found, flags.dispatch, settings.backward))
    if skewed:
        console.print(skew_table(skewed))
    console.print(
        f"link: {join['kind']}, {join['gb_per_s']:,.1f} GB/s a direction at {join['bytes'] / 1e6:,.1f} MB; "
        "times in us of the slowest rank, ±: half the distance of the quartiles over the rounds; skew as max/mean, CV"
    )
    if swept == [1]:
        console.print("overlap was not measured: with one chunk exchanges are waited for; give --overlap_chunks 2 4")
    print_noise(console, _spreads(found + skewed))
    if flags.trace:
        console.print(f"traces: {flags.trace}, a file for each rank and layer; open them at https://ui.perfetto.dev")
    if leads and flags.json:
        write_record(flags.json, "ep", {"settings": vars(flags), "link": join, "cases": found, "skewed": skewed})
    if leads and flags.plot:
        plots.save(plots.overlap(found, skewed, join, title), flags.plot)


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
    if "masked_matmul" in settings.strategies:
        raise ValueError(
            "bench.ep: masked_matmul lets every expert see every token on one device, got --strategy masked_matmul; "
            f"choose from {', '.join(STRATEGIES)}"
        )


def _spreads(rows: list[dict[str, Any]]) -> dict[str, Spread]:
    """Of all times, by name."""
    spreads: dict[str, Spread] = {}
    for row in rows:
        bias = f", bias {row['skew_bias']:g}" if "skew_bias" in row else ""
        head = f"{row['strategy']}, {row['chunks']} chunks{bias}"
        for by, times in (("", row), (" symmetric", row.get("symmetric", {"spread": {}}))):
            spreads |= {f"{head}{by} {name}": value for name, value in times["spread"].items()}
    return spreads


def _table(rows: list[dict[str, Any]], chunks: int, title: str, settings: Settings) -> Table:
    what = "forward + backward (T_select, T_pack and T_counts: forward)" if settings.backward else "forward"
    checks = (f"{row['strategy']}: {sentence(row['sum_of_parts'], ' + '.join(PARTS), 'T_seq')}" for row in rows)
    table = Table(
        title=f"{title}, {what}, {chunks} chunk{'s' if chunks > 1 else ''}",
        caption="\n".join(checks),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("strategy", no_wrap=True)
    columns = {name: key for name, key in COLUMNS.items() if key != "eta_trace" or key in rows[0]}
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["strategy"], *(_cell(row, key) for key in columns.values()))
    return table


def _cell(row: dict[str, Any], key: str) -> str:
    if key in ("expert", "rank"):
        return f"{row[f'{key}_max_over_mean']:.2f}, {row[f'{key}_cv']:.2f}"
    value = row[key]
    if value is None:
        return "-"
    text = f"{value:,.0f}" if key.startswith(("T_", "delta")) and abs(value) >= 100 else f"{value:.2f}"
    return with_spread(text, row["spread"].get(key))


def movement_table(found: list[dict[str, Any]], dispatch: str, backward: bool) -> Table:
    """Two lines per case that was measured both ways."""
    title = "rows there and back, forward"
    table = Table(title=f"{title}; layer: forward + backward" if backward else title, title_justify="left")
    for column in ("rows of", "chunks", "by"):
        table.add_column(column, no_wrap=True)
    for column in MOVEMENT_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        exchange = "exchanges" if dispatch == "symmetric" else dispatch
        layer = {"T_layer": row["spread"]["T_overlapped"]}
        exchanged = {**row, "T_layer": row["T_overlapped"], "spread": row["spread"] | layer}
        for by, times in ((exchange, exchanged), ("symmetric", row.get("symmetric"))):
            if times is not None:
                cells = (
                    with_spread(_movement_cell(key, times.get(key)), times["spread"].get(key))
                    for key in MOVEMENT_COLUMNS.values()
                )
                table.add_row(row["strategy"], str(row["chunks"]), by, *cells)
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
    """Rows of the first strategy, one a bias on `skew_experts` experts (an eighth of them if it is 0)."""
    strategy, experts = settings.strategies[0], settings.skew_experts or max(1, shape.experts // 8)
    found = []
    for bias in track(biases, "skew", console=console, transient=True):
        skewed = replace(settings, skew_experts=experts, skew_bias=bias)
        case = measure_strategy(strategy, shape, skewed, chunks, device, memory)
        found.append({"skew_experts": experts, "skew_bias": bias, "chunks": chunks, **case})
    return found


def skew_table(found: list[dict[str, Any]]) -> Table:
    """Latency against skew."""
    first = found[0]
    result = Table(
        title=f"{first['strategy']} with a bias on the first {first['skew_experts']} experts", title_justify="left"
    )
    for column in ("bias", "experts", "ranks", *SKEW_COLUMNS, "comm share", "symmetric"):
        result.add_column(column, justify="right")
    for row in found:
        symmetric = row.get("symmetric")
        result.add_row(
            f"{row['skew_bias']:g}",
            *(f"{row[f'{whose}_max_over_mean']:.2f}, {row[f'{whose}_cv']:.2f}" for whose in ("expert", "rank")),
            *(with_spread(f"{row[key]:,.0f}", row["spread"][key]) for key in SKEW_COLUMNS),
            f"{row['comm_share']:.0%}",
            "-" if symmetric is None else with_spread(f"{symmetric['T_layer']:,.0f}", symmetric["spread"]["T_layer"]),
        )
    return result
