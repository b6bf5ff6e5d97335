"""Benchmark records that the report can draw, and figures of those of one device: router, layer, kernels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.report.charts import Bars, Plot, Series, Strip, Strips, Table, axis, bar, longest_shown, number, plot
from moe_lightning.report.figures import DASH, PHASES, TIMES, Figure, Source, colours, printable, source
from moe_lightning.utils.provenance import current_names

#: What is read of each kind of record; a record of ours has these.
DRAWN: dict[str, tuple[str, ...]] = {
    "router": ("settings", "cases"),
    "layer": ("settings", "cases"),
    "ep": ("settings", "link", "cases"),
    "link": ("kind", "rows"),
    "scale": ("settings", "best"),
    "kernels": ("settings", "rows"),
}


@dataclass(frozen=True)
class Record:
    """Results of one benchmark."""

    name: str
    results: dict[str, Any]
    source: Source


def read_record(path: Path) -> Record:
    """ValueError for what cannot be read, is no record, or is one of a kind that is not drawn."""
    name = printable(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON in it"
        raise ValueError(f"report: --bench must be a readable JSON record, got {name} ({reason})") from error
    if not isinstance(record, dict) or not {"name", "results", "machine", "command"} <= record.keys():
        raise ValueError(f"report: --bench must be a record of moe_lightning.bench, got {name}, which is another file")
    kind = record["name"]
    if kind not in DRAWN:
        raise ValueError(f"report: --bench must be a record of bench {', '.join(DRAWN)}, got {name} of {kind!r}")
    missing = [field for field in DRAWN[kind] if field not in record["results"]]
    if missing:
        raise ValueError(f"report: a record of bench {kind} must hold {', '.join(missing)}, got {name} without")
    return Record(kind, current_names(record["results"]), source(printable(path.name), record))


_TIMES = {"cold_us": "CUDA graph, cold cache", "graph_us": "CUDA graph, warm cache", "eager_us": "eager"}
_CPU_TIMES = {"cold_us": "cold caches", "eager_us": "eager"}
_WAYS = {"cold_us": "cold", "graph_us": "warm", "eager_us": "eager"}
_PARTS = {"forward": ("T_logit", "T_select", "T_index", "T_permute"), "backward": ("T_logit", "T_select", "T_pack")}
_TABLE = ("T_route", "T_experts", "T_unpack", "layer")


def router_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure for each record and each set of sizes."""
    figures = []
    for record in records:
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for case in record.results["cases"]:
            groups.setdefault(tuple(case[name] for name in ("d_model", "num_experts", "top_k")), []).append(case)
        for (d_model, experts, top_k), cases in groups.items():
            sizes = f"d_model {d_model:,}, {experts} experts, top-{top_k}, {record.results['settings']['dtype']}"
            swept = len({case["tokens"] for case in cases}) > 1
            figures.append((_over_tokens if swept else _by_phase)(record, cases, sizes))
    return figures


def _over_tokens(record: Record, cases: list[dict[str, Any]], sizes: str) -> Figure:
    routes = [case["forward"]["parts"]["T_route"] for case in cases]
    column = _column(routes)
    colour = colours(case["router"] for case in cases)
    tokens = sorted({case["tokens"] for case in cases})
    series = [
        Series(name, colour[name], *_sorted((c["tokens"], r[column]) for c, r in zip(cases, routes, strict=True)
               if c["router"] == name), "solid points")
        for name in colour
    ]  # fmt: skip
    # Masked movement has a lower roofline bound, as it moves nothing: the line is of the routers that permute.
    bounds = [max(r["roofline_us"] for c, r in zip(cases, routes, strict=True) if c["tokens"] == t) for t in tokens]
    series.append(Series("roofline", "bound", tokens, bounds, "dashed"))
    y = axis("", [value for one in series for value in one.ys], log=True)
    chart = plot("T_route forward, µs", axis("tokens", tokens, log=True, marks=tokens, tight=True), y, series)
    text = f"{sizes}; {_times(record)[column]}. The roofline is the least time for the bytes and flops."
    return Figure("T_route over tokens", text, [chart], [record.source], [*colour.items(), ("roofline", "bound")])


def _by_phase(record: Record, cases: list[dict[str, Any]], sizes: str) -> Figure:
    charts: list[Bars | Plot | Table] = []
    shown: dict[str, None] = {}
    for direction, names in _PARTS.items():
        of_cases = [(case["router"], case[direction]["parts"]) for case in cases if direction in case]
        if not of_cases:
            continue
        column = _column([parts[name] for _, parts in of_cases for name in names])
        rows = [[(name, PHASES[name], parts[name][column]) for name in names] for _, parts in of_cases]
        bounds = [sum(parts[name]["roofline_us"] for name in names) for _, parts in of_cases]
        totals = [sum(value for _, _, value in row) for row in rows]
        longest = longest_shown(totals, bounds)
        bars = [
            bar(router, row, longest, "µs", bound)
            for (router, _), row, bound in zip(of_cases, rows, bounds, strict=True)
        ]
        charts.append(Bars(f"T_route {direction}, µs", bars, note=_times(record)[column]))
        shown |= dict.fromkeys(names)
    charts.append(_table(cases))
    text = (
        f"{cases[0]['tokens']:,} tokens, {sizes}. The mark is the roofline: the least time for the bytes and "
        "flops on this machine. Each chart has a scale of its own. The table is of the forward pass."
    )
    legend = [(name, PHASES[name]) for name in shown]
    return Figure("Phases of routing", text, charts, [record.source], [*legend, ("roofline", "roofline")])


def _table(cases: list[dict[str, Any]]) -> Table:
    """Each of its times as it was measured; where not all were in one way, each says in which."""
    rows = []
    every = [case["forward"]["parts"][name] for case in cases for name in _TABLE if name in case["forward"]["parts"]]
    mixed = len({_column([row]) for row in every}) > 1

    def time(row: dict[str, Any]) -> str:
        column = _column([row])
        return number(row[column]) + (f" {_WAYS[column]}" if mixed else "")

    for case in cases:
        parts = case["forward"]["parts"]
        route = parts["T_route"]
        times = [time(parts[name]) if name in parts else DASH for name in _TABLE]
        details = (
            f"{route[_column([route])] / route['roofline_us']:.1f}{TIMES}",
            DASH if route["launches"] is None else f"{route['launches']:,}",
        )
        rows.append([case["router"], times[0], *details, *times[1:]])
    return Table(["router", "T_route, µs", "x SOL", "launches", "T_experts", "T_unpack", "layer"], rows)


def _column(rows: list[dict[str, Any]]) -> str:
    """The time that all rows have, cold before warm before eager."""
    return next(c for c in ("cold_us", "graph_us", "eager_us") if all(row[c] is not None for row in rows))


def _times(record: Record) -> dict[str, str]:
    return _TIMES if record.results["settings"]["device"] == "cuda" else _CPU_TIMES


def _sorted(points: Any) -> tuple[list[float], list[float]]:
    xs, ys = zip(*sorted(points), strict=True)
    return list(xs), list(ys)


def layer_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure per record: for each shape two charts, forward alone and with backward."""
    return [_layer(record) for record in records]


def _layer(record: Record) -> Figure:
    cases, dtype = record.results["cases"], record.results["settings"]["dtype"]
    charts = []
    for case in [case for case in cases if case["rows"]]:
        size = (
            f"{case['tokens']:,} tokens, d_model {case['d_model']:,}, hidden {case['mlp_hidden_dim']:,}, "
            f"{case['num_experts']} experts, top-{case['top_k']}"
        )
        for direction, bound in case["roofline_ms"].items():
            times = [(row["variant"], row[direction]["ms"]) for row in case["rows"]]
            fastest = min(ms for _, ms in times)
            longest = longest_shown([ms for _, ms in times], [bound])
            rows = [
                bar(variant, [(variant, "c5" if ms == fastest else "pack", ms)], longest, "ms", bound)
                for variant, ms in times
            ]
            charts.append(Bars(f"{direction}, ms", rows, note=size))
    load = sorted({round(case["load"]["max_over_mean"], 2) for case in cases})
    loads = " to ".join(number(value) for value in dict.fromkeys((load[0], load[-1])))
    text = (
        f"The whole layer in {dtype}, load max / mean {loads}. The mark is the roofline of bytes and flops. Each chart "
        "has a scale of its own."
    )
    return Figure(
        "Layer by implementation", text, charts, [record.source], [("fastest", "c5"), ("roofline", "roofline")]
    )


def kernel_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure per record: each kernel and the torch calls that it replaces, on one logarithmic axis."""
    return [_kernels(record) for record in records]


def _kernels(record: Record) -> Figure:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record.results["rows"]:
        groups.setdefault((row["case"], row["size"]), []).append(row)
    every = [value for rows in groups.values() for row in rows for value in (row["roofline_us"], row["graph_us"])]
    x = axis("µs, CUDA graph, warm cache", every, log=True)
    strips = []
    for (case, size), (ours, *others) in groups.items():
        marks = [(x.percent(ours["roofline_us"]), "roofline", f"roofline: {number(ours['roofline_us'])} µs")]
        marks += [
            (x.percent(row["graph_us"]), "torch", f"{row['variant']}: {number(row['graph_us'])} µs") for row in others
        ]
        marks.append((x.percent(ours["graph_us"]), "c2", f"{ours['variant']}: {number(ours['graph_us'])} µs"))
        nearest = min((row["faster"] for row in others), default=None)
        text = number(ours["graph_us"]) + (f" · {nearest:.3g}{TIMES}" if nearest else "")
        strips.append(Strip(case, size, marks, text))
    legend = [("kernel", "c2"), ("torch", "torch"), ("roofline", "roofline")]
    text = (
        f"{record.results['settings']['dtype']}, a logarithmic scale. Right: the kernel's µs, and how many times "
        "faster it is than the fastest in torch."
    )
    return Figure("Kernels against torch", text, [Strips("", x, strips)], [record.source], legend)
