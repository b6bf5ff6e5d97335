"""The permutation alone, over batch sizes: latency and share of the copy bandwidth, against plain torch."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from moe_lightning.bench.calls import CallFactory, forward_factory
from moe_lightning.bench.cli import Settings, measured_peaks, shapes
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.roofline import Peaks, Shape, forward_costs
from moe_lightning.bench.spread import as_row, print_noise, with_spread
from moe_lightning.bench.timers import headline, time_calls, timed_as
from moe_lightning.ops import RoutingIndex, build_index, permute
from moe_lightning.utils.checks import check_sizes

#: What is compared. "index_select" finds perm // top_k ready, "x[perm // K]" works it out.
VARIANTS = ("x[perm // K]", "index_select", "permute")


def run(flags: argparse.Namespace, settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, print, write the CSV; return the record."""
    if flags.backward:
        raise ValueError("bench.router: --perm_sweep measures the forward permutation alone, got --backward; drop it")
    check_sizes("bench.router", seq_len=flags.seq_len)
    for batch in flags.batch_sizes:
        check_sizes("bench.router", batch_sizes=batch)
    for name in ("d_model", "num_experts", "top_k"):
        if len(getattr(flags, name)) > 1:
            raise ValueError(
                f"bench.router: --perm_sweep takes one {name}, got {getattr(flags, name)}; run it for each"
            )
    tokens = [flags.seq_len * batch for batch in flags.batch_sizes]
    swept = shapes("bench.router", settings, vars(flags) | {"tokens": tokens})
    peaks = measured_peaks(settings, console)
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("batch sizes", total=len(swept))
        for batch, shape in zip(flags.batch_sizes, swept, strict=True):
            head = {"batch_size": batch, "seq_len": flags.seq_len}
            rows += [head | row for row in _measure(shape, settings, peaks, progress)]
            progress.advance(task)
    console.print(_table(rows, settings))
    spreads = {
        f"{row['variant']}, {row['tokens']} tokens {key[:-3]}": us for row in rows for key, us in row["spread"].items()
    }
    print_noise(console, spreads)
    if flags.csv:
        _write_csv(flags.csv, rows)
    return {"peaks": vars(peaks), "perm_sweep": rows}


def _measure(shape: Shape, settings: Settings, peaks: Peaks, progress: Progress) -> list[dict[str, Any]]:
    cost = forward_costs(shape, masked=False)["T_permute"]
    roofline_us = peaks.roofline_us(cost)
    with side_stream(settings.device):
        factories = _makes(shape, settings)
        times = time_calls(factories, dict.fromkeys(factories, cost.reads), settings.device, settings.rounds, progress)
    rows = []
    for name, measured in times.items():
        row = as_row(vars(measured))
        us = row["spread"][headline(row)]
        rows.append(
            {
                "tokens": shape.tokens,
                "d_model": shape.d_model,
                "num_experts": shape.num_experts,
                "top_k": shape.top_k,
                "dtype": settings.dtype_name,
                "variant": name,
                **row,
                "us": us.median,
                "us_q1": us.q1,
                "us_q3": us.q3,
                "bytes": cost.bytes,
                "roofline_us": roofline_us,
                "bandwidth_share": cost.bytes / (us.median * 1e-6) / peaks.copy,
            }
        )
    return rows


def _makes(shape: Shape, settings: Settings) -> dict[str, CallFactory]:
    top_k = shape.top_k
    generator = torch.Generator(settings.device).manual_seed(0)
    options: dict[str, Any] = {"device": settings.device, "generator": generator}
    x_TD = torch.randn(shape.tokens, shape.d_model, **options).to(settings.dtype)
    logits_TE = torch.randn(shape.tokens, shape.num_experts, **options)
    logits_TE[:, : settings.skew_experts] += settings.skew_bias
    index = build_index(logits_TE.topk(top_k).indices.int(), shape.num_experts)
    token_N = index.perm_N // top_k

    def ours(x_TD: Tensor, index: RoutingIndex) -> Tensor:
        return permute(x_TD, index, top_k)

    calls: tuple[CallFactory, ...] = (
        forward_factory(lambda x_TD, perm_N: x_TD[perm_N // top_k], (x_TD, index.perm_N)),
        forward_factory(lambda x_TD, token_N: x_TD.index_select(0, token_N), (x_TD, token_N)),
        forward_factory(ours, (x_TD, index)),
    )
    return dict(zip(VARIANTS, calls, strict=True))


def _table(rows: list[dict[str, Any]], settings: Settings) -> Table:
    first = rows[0]
    timed = timed_as(rows, settings.device)
    table = Table(
        title=f"T_permute: d_model {first['d_model']}, {first['num_experts']} experts, top-{first['top_k']}, "
        f"{settings.dtype_name}, {settings.device_name}",
        caption=f"us: median, {timed}; %: bytes at least moved, over the time, of the measured copy bandwidth; "
        "last: how many times faster permute is",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("batch", "tokens", "MB", "roofline us"):
        table.add_column(column, justify="right")
    for variant in VARIANTS:
        table.add_column(escape(f"{variant} us"), justify="right")
        table.add_column("%", justify="right")
    for variant in VARIANTS[:-1]:
        table.add_column(escape(f"x {variant}"), justify="right")
    for start in range(0, len(rows), len(VARIANTS)):
        group = rows[start : start + len(VARIANTS)]
        head = group[0]
        cells = [
            str(head["batch_size"]),
            str(head["tokens"]),
            f"{head['bytes'] / 1e6:,.2f}",
            f"{head['roofline_us']:,.1f}",
        ]
        for row in group:
            us = with_spread(f"{row['us']:,.1f}", row["spread"][headline(row)])
            cells += [us, f"{row['bandwidth_share']:.0%}"]
        table.add_row(*cells, *(f"{row['us'] / group[-1]['us']:.2f}" for row in group[:-1]))
    return table


def _write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "spread"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
