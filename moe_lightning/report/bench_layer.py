"""Figures of `bench layer` and `bench kernels`: ours beside torch and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.report.charts import Bars, Strip, Strips, bar, longest_shown
from moe_lightning.report.figures import Figure
from moe_lightning.report.read_bench import Record
from moe_lightning.report.scales import TIMES, axis, number


def layer_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure a record: for each shape two charts, forward alone and with backward."""
    return [_layer(record) for record in records]


def _layer(record: Record) -> Figure:
    cases, dtype = record.results["cases"], record.results["settings"]["dtype"]
    charts = []
    for case in [case for case in cases if case["rows"]]:
        size = (
            f"{case['tokens']:,} tokens, d_model {case['d_model']:,}, hidden {case['hidden_dim']:,}, "
            f"{case['experts']} experts, top-{case['top_k']}"
        )
        for direction, floor in case["floor_ms"].items():
            times = [(row["variant"], row[direction]["ms"]) for row in case["rows"]]
            fastest = min(ms for _, ms in times)
            longest = longest_shown([ms for _, ms in times], [floor])
            rows = [
                bar(variant, [(variant, "c5" if ms == fastest else "pack", ms)], longest, "ms", floor)
                for variant, ms in times
            ]
            charts.append(Bars(f"{direction}, ms", rows, note=size))
    load = sorted({round(case["load"]["max_over_mean"], 2) for case in cases})
    loads = " to ".join(number(value) for value in dict.fromkeys((load[0], load[-1])))
    text = (
        f"The whole layer in {dtype}, load max / mean {loads}. The mark is the floor of bytes and flops. Each chart "
        "has a scale of its own."
    )
    return Figure("Layer by implementation", text, charts, [record.source], [("fastest", "c5"), ("floor", "floor")])


def kernel_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure a record: each kernel beside torch's ways, on one logarithmic axis."""
    return [_kernels(record) for record in records]


def _kernels(record: Record) -> Figure:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record.results["rows"]:
        groups.setdefault((row["case"], row["size"]), []).append(row)
    every = [value for rows in groups.values() for row in rows for value in (row["floor_us"], row["graph_us"])]
    x = axis("µs, CUDA graph, warm cache", every, log=True)
    strips = []
    for (case, size), (ours, *others) in groups.items():
        marks = [(x.percent(ours["floor_us"]), "floor", f"floor: {number(ours['floor_us'])} µs")]
        marks += [
            (x.percent(row["graph_us"]), "torch", f"{row['variant']}: {number(row['graph_us'])} µs") for row in others
        ]
        marks.append((x.percent(ours["graph_us"]), "c2", f"{ours['variant']}: {number(ours['graph_us'])} µs"))
        nearest = min((row["faster"] for row in others), default=None)
        text = number(ours["graph_us"]) + (f" · {nearest:.3g}{TIMES}" if nearest else "")
        strips.append(Strip(case, size, marks, text))
    legend = [("kernel", "c2"), ("torch", "torch"), ("floor", "floor")]
    text = (
        f"{record.results['settings']['dtype']}, a logarithmic scale. Right: the kernel's µs, and how many times "
        "faster it is than the fastest of torch's ways."
    )
    return Figure("Kernels beside torch", text, [Strips("", x, strips)], [record.source], legend)
