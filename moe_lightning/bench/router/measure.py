"""All routers at one shape: times, roofline bounds, shares, load skew, and the checks that parts make the whole."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from moe_lightning.bench.calls import CallFactory
from moe_lightning.bench.cli import Settings
from moe_lightning.bench.gpu_timers import side_stream
from moe_lightning.bench.roofline import Cost, Peaks, Shape, backward_costs, forward_costs
from moe_lightning.bench.router.case import backward_parts, build_cases, forward_parts
from moe_lightning.bench.router.in_layer import add_in_layer, measure_in_layer
from moe_lightning.bench.spread import Spread, as_row, sum_of_parts, total
from moe_lightning.bench.timers import Times, headline, time_calls

TIMES = ("eager_us", "graph_us", "cold_us", "host_us", "launches")
#: Rows of a result, in the order of a layer; those that are sums or wholes have more than one part.
ROWS = ("T_logit", "T_select", "T_index", "T_permute", "T_pack", "T_route", "T_experts", "T_unpack", "layer")

Row = dict[str, Any]


def measure(shape: Shape, settings: Settings, peaks: Peaks, progress: Progress) -> list[dict[str, Any]]:
    """One result per router: shape, load, and for each direction its rows and how far they are from the wholes."""
    with side_stream(settings.device):
        cases = build_cases(settings.routers, shape, settings, peaks)
        results: dict[str, dict[str, Any]] = {
            name: {
                "router": name,
                "tokens": shape.tokens,
                "d_model": shape.d_model,
                "num_experts": shape.num_experts,
                "top_k": shape.top_k,
                "mlp_hidden_dim": shape.mlp_hidden_dim,
                "load": case.load(),
                "layer_left_out": case.without_layer,
            }
            for name, case in cases.items()
        }
        for direction in ("forward", "backward") if settings.backward else ("forward",):
            factories: dict[str, CallFactory] = {}
            costs: dict[str, Cost] = {}
            for name, case in cases.items():
                with_experts = case.without_layer is None
                if direction == "forward":
                    parts = forward_parts(case.moe, case.x_TD, case.rows_out, with_experts)
                else:
                    parts = backward_parts(case.moe, case.x_TD, case.rows_out, with_experts, case.generator)
                fused_weights = not case.masked and case.moe.experts.fuses_weights(case.x_TD)
                counted = (forward_costs if direction == "forward" else backward_costs)(
                    shape, case.masked, fused_weights
                )
                factories |= {f"{name}/{part}": make for part, make in parts.items()}
                costs |= {f"{name}/{part}": cost for part, cost in counted.items()}
            reads = {key: _reads(key, costs) for key in factories}
            times = time_calls(factories, reads, settings.device, settings.rounds, progress)
            for name in cases:
                own_times = {key.split("/")[1]: value for key, value in times.items() if key.startswith(f"{name}/")}
                own_costs = {key.split("/")[1]: value for key, value in costs.items() if key.startswith(f"{name}/")}
                results[name][direction] = account(direction, own_times, own_costs, peaks)
        for name, directions in measure_in_layer(cases, settings.rounds, settings.backward, progress).items():
            for direction, in_layer in directions.items():
                add_in_layer(results[name][direction], in_layer)
    return list(results.values())


def _reads(key: str, costs: dict[str, Cost]) -> int:
    """Bytes of a call's inputs; those of a whole are the tokens and the weights."""
    router, name = key.split("/")
    wholes = {"route": ("T_logit",), "layer": ("T_logit", "T_experts")}
    return sum(costs[f"{router}/{part}"].reads for part in wholes.get(name, (name,)))


def account(direction: str, times: dict[str, Times], costs: dict[str, Cost], peaks: Peaks) -> dict[str, Any]:
    """Rows with sums, floors, ratios and shares; how far the parts of a route and of a layer are from the wholes."""
    rows: dict[str, Row] = {}
    for name in times:
        rows[name] = as_row({column: getattr(times[name], column) for column in TIMES})
        if name in costs:
            cost = costs[name]
            rows[name] |= {"bytes": cost.bytes, "flops": cost.flops, "roofline_us": peaks.roofline_us(cost)}
    route, layer_parts = rows.pop("route", None), None
    if direction == "forward":
        rows["T_pack"] = _sum([rows["T_index"], rows["T_permute"]])
    if "T_pack" in rows:
        rows["T_route"] = _sum([rows["T_logit"], rows["T_select"], rows["T_pack"]])
    if "layer" in rows:
        layer_parts = _sum([rows["T_route"], rows["T_experts"], rows["T_unpack"]])
        rows["layer"] |= {column: layer_parts[column] for column in ("bytes", "flops", "roofline_us")}
    for row in rows.values():
        row["x_sol"] = row[headline(row)] / row["roofline_us"] if row["roofline_us"] else None
        row["layer_share"] = _share(row, rows.get("layer"))
    return {
        "parts": {name: rows[name] for name in ROWS if name in rows},
        "sum_of_parts": _check(rows["T_route"], route) | {"whole": route} if route else None,
        "layer_sum_of_parts": (_check(layer_parts, rows["layer"]) | {"parts": layer_parts} if layer_parts else None),
        "in_layer": None,
    }


def _sum(rows: list[Row]) -> Row:
    columns = (*TIMES, "bytes", "flops", "roofline_us")
    values = {column: [row[column] for row in rows] for column in columns}
    sums = {column: None if None in column_values else sum(column_values) for column, column_values in values.items()}
    spreads: list[dict[str, Spread]] = [row["spread"] for row in rows]
    shared = [column for column in spreads[0] if all(column in spread for spread in spreads)]
    return sums | {"spread": {column: total(spread[column] for spread in spreads) for column in shared}}


def _share(row: Row, layer: Row | None) -> float | None:
    """Of the layer's time, both as graphs or both eager."""
    if layer is None:
        return None
    column = "graph_us" if None not in (row["graph_us"], layer["graph_us"]) else "eager_us"
    return row[column] / layer[column]


def _check(parts: Row, whole: Row) -> dict[str, Any]:
    column = "graph_us" if None not in (parts["graph_us"], whole["graph_us"]) else "eager_us"
    return {"column": column, **sum_of_parts(parts["spread"][column], whole["spread"][column])}
