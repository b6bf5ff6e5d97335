"""The break-even of masked_matmul: the number of experts from which sorting and gathering rows is cheaper.

The same layer, from a selection to its output (T_index, T_permute, T_experts, T_unpack), with masked and with
permuting movement, over E = top_k, 2 top_k, 4 top_k...
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_lightning.bench.cli import Settings
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.roofline import Peaks, Shape, forward_costs
from moe_lightning.bench.router.case import build_cases, movement_part
from moe_lightning.bench.spread import TOO_NOISY, as_row, print_noise, with_spread
from moe_lightning.bench.timers import time_calls
from moe_lightning.ops import native

MOVEMENTS = {"masked": "masked_matmul", "permute": "naive_topk"}


def measure(shape: Shape, settings: Settings, peaks: Peaks, progress: Progress) -> dict[str, Any]:
    """Times of both movements up to the first E where masked is slower, and the result in words."""
    settings = dataclasses.replace(settings, skew_experts=min(settings.skew_experts, shape.top_k))
    rows: list[dict[str, Any]] = []
    left_out, experts = None, shape.top_k
    while experts <= native.MAX_EXPERTS and not (rows and rows[-1]["masked_us"] > rows[-1]["permute_us"]):
        row = _row(dataclasses.replace(shape, num_experts=experts), settings, peaks, progress)
        if isinstance(row, str):
            left_out = row
            break
        rows.append({"num_experts": experts, **row})
        experts *= 2
    crossing = crossing_of([(row["num_experts"], row["masked_us"] / row["permute_us"]) for row in rows])
    return {
        "tokens": shape.tokens,
        "d_model": shape.d_model,
        "mlp_hidden_dim": shape.mlp_hidden_dim,
        "top_k": shape.top_k,
        "rows": rows,
        "left_out": left_out,
        "crossover": crossing,
        "answer": answer([row["num_experts"] for row in rows], crossing, left_out, doubted(rows)),
    }


def _row(shape: Shape, settings: Settings, peaks: Peaks, progress: Progress) -> dict[str, Any] | str:
    """Both times at one E, or why there are none."""
    with side_stream(settings.device):
        built = build_cases(tuple(MOVEMENTS.values()), shape, settings, peaks)
        cases = {movement: built[name] for movement, name in MOVEMENTS.items()}
        reason = next((case.without_layer for case in cases.values() if case.without_layer), None)
        if reason:
            return reason
        factories = {movement: movement_part(case.moe, case.x_TD) for movement, case in cases.items()}
        reads = {name: forward_costs(shape, case.masked)["T_experts"].reads for name, case in cases.items()}
        times = time_calls(factories, reads, settings.device, settings.rounds, progress)
    column = "eager_us" if any(t.graph_us is None for t in times.values()) else "graph_us"
    return {"column": column} | as_row({f"{movement}_us": getattr(t, column) for movement, t in times.items()})


def crossing_of(ratios: list[tuple[int, float]]) -> float | None:
    """E at which masked over permute passes 1, a straight line between its neighbours in logarithms; else None."""
    for (low, before), (high, after) in pairwise(ratios):
        if before <= 1 < after:
            part = math.log(before) / (math.log(before) - math.log(after))
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return None


def doubted(rows: list[dict[str, Any]]) -> bool:
    """Whether noise may have made the answer.

    With two rows or more it is a place between the last two, of which no time may be too noisy. With one it is only
    which movement is faster, and that is clear where the ranges of their times do not meet.
    """
    if len(rows) == 1:
        masked, permute = (rows[0]["spread"][f"{movement}_us"] for movement in MOVEMENTS)
        meet = masked.range[0] <= permute.range[1] and permute.range[0] <= masked.range[1]
        return meet and bool(masked.doubt or permute.doubt)
    return any(spread.doubt for row in rows[-2:] for spread in row["spread"].values())


def answer(experts: list[int], crossing: float | None, left_out: str | None, doubted: bool = False) -> str:
    """One sentence."""
    if experts and doubted:
        return f"masked_matmul: {TOO_NOISY} at how many experts it breaks even"
    if not experts:
        return f"masked_matmul: no crossover measured, {left_out}"
    if crossing is not None:
        return f"masked_matmul breaks even at E={crossing:.1f}"
    if len(experts) == 1 and left_out is None:
        return f"masked_matmul breaks even below E={experts[0]}"
    return f"masked_matmul breaks even beyond E={experts[-1]}" + (f" ({left_out})" if left_out else "")


def show(crossing: dict[str, Any], console: Console) -> None:
    """Print a row for each E, and the answer."""
    console.print(
        f"masked and permuting movement: {crossing['tokens']} tokens x {crossing['d_model']}, "
        f"experts of {crossing['mlp_hidden_dim']}, top-{crossing['top_k']}, forward, selection to output"
    )
    if crossing["rows"]:
        table = Table()
        for column in ("E", "masked us", "permute us", "masked / permute"):
            table.add_column(column, justify="right")
        for row in crossing["rows"]:
            times = (with_spread(f"{row[key]:,.1f}", row["spread"][key]) for key in ("masked_us", "permute_us"))
            table.add_row(str(row["num_experts"]), *times, f"{row['masked_us'] / row['permute_us']:.2f}")
        console.print(table)
        spreads = {
            f"E={row['num_experts']} {key[:-3]}": us for row in crossing["rows"] for key, us in row["spread"].items()
        }
        print_noise(console, spreads)
    console.print(crossing["answer"])
