"""Figures of `bench router`: phases beside their floors, or T_route over the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.report.charts import Bars, Plot, Series, Table, bar, longest_shown, plot
from moe_lightning.report.figures import PHASES, Figure, colours
from moe_lightning.report.read_bench import Record
from moe_lightning.report.scales import DASH, TIMES, axis, number

_TIMES = {"cold_us": "CUDA graph, cold cache", "graph_us": "CUDA graph, warm cache", "eager_us": "eager"}
_CPU_TIMES = {"cold_us": "cold caches", "eager_us": "eager"}
_WAYS = {"cold_us": "cold", "graph_us": "warm", "eager_us": "eager"}
_PARTS = {"forward": ("T_logit", "T_select", "T_index", "T_permute"), "backward": ("T_logit", "T_select", "T_pack")}
_TABLE = ("T_route", "T_experts", "T_unpack", "layer")


def router_figures(records: Sequence[Record]) -> list[Figure]:
    """A figure for each record and each set of sizes."""
    found = []
    for record in records:
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for case in record.results["cases"]:
            groups.setdefault(tuple(case[name] for name in ("d_model", "experts", "top_k")), []).append(case)
        for (d_model, experts, top_k), cases in groups.items():
            sizes = f"d_model {d_model:,}, {experts} experts, top-{top_k}, {record.results['settings']['dtype']}"
            swept = len({case["tokens"] for case in cases}) > 1
            found.append((_over_tokens if swept else _by_phase)(record, cases, sizes))
    return found


def _over_tokens(record: Record, cases: list[dict[str, Any]], sizes: str) -> Figure:
    routes = [case["forward"]["parts"]["T_route"] for case in cases]
    column = _column(routes)
    colour = colours(case["strategy"] for case in cases)
    tokens = sorted({case["tokens"] for case in cases})
    series = [
        Series(name, colour[name], *_sorted((c["tokens"], r[column]) for c, r in zip(cases, routes, strict=True)
               if c["strategy"] == name), "solid points")
        for name in colour
    ]  # fmt: skip
    # Masked movement has a lower floor, as it moves nothing: the line is that of the strategies that permute.
    floors = [max(r["floor_us"] for c, r in zip(cases, routes, strict=True) if c["tokens"] == t) for t in tokens]
    series.append(Series("floor", "bound", tokens, floors, "dashed"))
    y = axis("", [value for one in series for value in one.ys], log=True)
    chart = plot("T_route forward, µs", axis("tokens", tokens, log=True, marks=tokens, snug=True), y, series)
    text = f"{sizes}; {_times(record)[column]}. The floor is the least that bytes and flops allow on this machine."
    return Figure("T_route over tokens", text, [chart], [record.source], [*colour.items(), ("floor", "bound")])


def _by_phase(record: Record, cases: list[dict[str, Any]], sizes: str) -> Figure:
    charts: list[Bars | Plot | Table] = []
    shown: dict[str, None] = {}
    for direction, names in _PARTS.items():
        of_cases = [(case["strategy"], case[direction]["parts"]) for case in cases if direction in case]
        if not of_cases:
            continue
        column = _column([parts[name] for _, parts in of_cases for name in names])
        rows = [[(name, PHASES[name], parts[name][column]) for name in names] for _, parts in of_cases]
        floors = [sum(parts[name]["floor_us"] for name in names) for _, parts in of_cases]
        totals = [sum(value for _, _, value in row) for row in rows]
        longest = longest_shown(totals, floors)
        bars = [
            bar(strategy, row, longest, "µs", floor)
            for (strategy, _), row, floor in zip(of_cases, rows, floors, strict=True)
        ]
        charts.append(Bars(f"T_route {direction}, µs", bars, note=_times(record)[column]))
        shown |= dict.fromkeys(names)
    charts.append(_table(cases))
    text = (
        f"{cases[0]['tokens']:,} tokens, {sizes}. The mark is the floor: the least that bytes and flops allow on this "
        "machine. Each chart has a scale of its own. The table is of the forward pass."
    )
    legend = [(name, PHASES[name]) for name in shown]
    return Figure("Phases of routing", text, charts, [record.source], [*legend, ("floor", "floor")])


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
        beside = (
            f"{route[_column([route])] / route['floor_us']:.1f}{TIMES}",
            DASH if route["launches"] is None else f"{route['launches']:,}",
        )
        rows.append([case["strategy"], times[0], *beside, *times[1:]])
    return Table(["router", "T_route, µs", "over its floor", "launches", "T_experts", "T_unpack", "layer"], rows)


def _column(rows: list[dict[str, Any]]) -> str:
    """The time that all rows have, cold before warm before eager."""
    return next(c for c in ("cold_us", "graph_us", "eager_us") if all(row[c] is not None for row in rows))


def _times(record: Record) -> dict[str, str]:
    return _TIMES if record.results["settings"]["device"] == "cuda" else _CPU_TIMES


def _sorted(points: Any) -> tuple[list[float], list[float]]:
    xs, ys = zip(*sorted(points), strict=True)
    return list(xs), list(ys)
