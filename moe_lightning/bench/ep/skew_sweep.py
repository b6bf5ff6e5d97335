"""A layer under one uneven load after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lightning.bench.accounting import Shape
from moe_lightning.bench.ep.measure import measure_strategy
from moe_lightning.bench.settings import Settings
from moe_lightning.bench.spread import with_spread
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory

COLUMNS = ("T_comm", "T_comp", "T_seq", "T_overlapped")


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


def table(found: list[dict[str, Any]]) -> Table:
    """Latency against skew."""
    first = found[0]
    result = Table(
        title=f"{first['strategy']} with a bias on the first {first['skew_experts']} experts", title_justify="left"
    )
    for column in ("bias", "experts", "ranks", *COLUMNS, "comm share", "symmetric"):
        result.add_column(column, justify="right")
    for row in found:
        symmetric = row.get("symmetric")
        result.add_row(
            f"{row['skew_bias']:g}",
            *(f"{row[f'{whose}_max_over_mean']:.2f}, {row[f'{whose}_cv']:.2f}" for whose in ("expert", "rank")),
            *(with_spread(f"{row[key]:,.0f}", row["spread"][key]) for key in COLUMNS),
            f"{row['comm_share']:.0%}",
            "-" if symmetric is None else with_spread(f"{symmetric['T_layer']:,.0f}", symmetric["spread"]["T_layer"]),
        )
    return result
