"""The router benchmark's tables, and the cells that other benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from moe_lightning.bench.cli import Settings
from moe_lightning.bench.router.in_layer import AGREES, ALONE
from moe_lightning.bench.spread import Spread, sentence, with_spread

#: Column headings, and what they show of a row: times, launches, bytes and the roofline bound.
MEASURED = {
    "graph us": "graph_us",
    "cold us": "cold_us",
    "eager us": "eager_us",
    "host us": "host_us",
    "launches": "launches",
    "MB": "bytes",
    "roofline us": "roofline_us",
}
_COLUMNS = {
    "graph us": "graph_us",
    "cold us": "cold_us",
    "eager us": "eager_us",
    "in layer us": "in_layer_us",
    **MEASURED,
    "x SOL": "x_sol",
    "of layer": "layer_share",
}
_BOLD = ("T_route",)


def direction_table(results: list[dict[str, Any]], direction: str, settings: Settings) -> Table:
    """One section per router, its load skew below its name; the caption holds the checks."""
    table = Table(
        title=f"{direction}: {shape_title(results[0])}, {settings.dtype_name}, {settings.device_name}",
        caption=_caption(results, direction, settings),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("router", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        load = result["load"]
        notes = iter([result["router"], f"max/mean {load['max_over_mean']:.2f}", f"CV {load['cv']:.2f}"])
        for name, row in result[direction]["parts"].items():
            table.add_row(next(notes, ""), name, *cells(row, _COLUMNS), style="bold" if name in _BOLD else None)
            if name == "T_route" and result[direction]["sum_of_parts"]:
                whole = result[direction]["sum_of_parts"]["whole"]
                table.add_row(next(notes, ""), "  in one go", *cells(whole, _COLUMNS))
            if name == "layer":
                parts = result[direction]["layer_sum_of_parts"]["parts"]
                parts = parts | {"in_layer_us": (result[direction]["in_layer"] or {}).get("parts_us")}
                shown = {**_COLUMNS, "x SOL": "", "of layer": ""}
                table.add_row(next(notes, ""), "  its parts", *cells(parts, shown))
        table.add_section()
    return table


def direction_spreads(results: list[dict[str, Any]], direction: str) -> dict[str, Spread]:
    """Of all times of a table, by name; sums are left out, as their parts are counted."""
    spreads: dict[str, Spread] = {}
    for result in results:
        own = result[direction]
        rows = {name: row for name, row in own["parts"].items() if name not in ("T_pack", "T_route")}
        if own["sum_of_parts"]:
            rows["T_route in one go"] = own["sum_of_parts"]["whole"]
        for name, row in rows.items():
            spreads |= {f"{result['router']} {name} {key[:-3]}": value for key, value in row["spread"].items()}
    return spreads


def shape_title(result: dict[str, Any]) -> str:
    """The sizes, in words."""
    return (
        f"{result['tokens']} tokens x {result['d_model']}, {result['num_experts']} experts of "
        f"{result['mlp_hidden_dim']}, top-{result['top_k']}"
    )


def cells(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """A row as its columns show it, times with their spread."""
    return [with_spread(cell(key, row.get(key)), row["spread"].get(key)) for key in columns.values()]


def cell(key: str, value: float | None) -> str:
    """A number as its column shows it."""
    if value is None:
        return "-"
    if key == "launches":
        return str(value)
    if key == "bytes":
        return _digits(value / 1e6)
    if key in ("layer_share", "copy_share"):
        return f"{value:.1%}"
    return _digits(value)


def _digits(value: float) -> str:
    """Three to four figures, whatever the size."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _outside(result: dict[str, Any], direction: str) -> Iterator[str]:
    """A line per phase that takes another time within the layer than alone."""
    for name, gap in result[direction]["in_layer"]["outside"].items():
        row = result[direction]["parts"][name]
        alone = sorted(row[column] for column in ALONE if row[column] is not None)
        times = " to ".join(dict.fromkeys((_digits(alone[0]), _digits(alone[-1]))))
        yield (
            f"{result['router']}: OVER {AGREES:.0%}: {name} in the layer {_digits(row['in_layer_us'])} us, "
            f"alone {times} us, gap {gap:.1%}"
        )


def _caption(results: list[dict[str, Any]], direction: str, settings: Settings) -> str:
    lines = []
    for result in results:
        for key, whole in (("sum_of_parts", "T_route in one go"), ("layer_sum_of_parts", "layer in one go")):
            if check := result[direction][key]:
                lines.append(f"{result['router']}: {sentence(check, 'parts', whole)} ({check['column'][:-3]})")
        if check := result[direction]["in_layer"]:
            lines.append(f"{result['router']}: {sentence(check, 'phases in the layer', 'layer without a hook')}")
            lines += _outside(result, direction)
        if result["layer_left_out"]:
            lines.append(f"{result['router']}: no layer, {result['layer_left_out']}")
    if settings.device.type == "cpu":
        lines.append("graph, host and launches are of a GPU; cold: each call after the caches were overwritten")
    lines.append("in layer: by the callback's clock, of phases within the layer; of the layer without it")
    lines.append("±: half the distance of the quartiles over the rounds, in % of the median")
    lines.append("x SOL is of the cold time where there is one; of layer is of the layer in one go, graph or eager")
    return "\n".join(lines)
