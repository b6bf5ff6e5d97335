"""Figures of `bench ep`, `bench link` and `bench scale`: exchanges between ranks, and what overlap hides of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.report.charts import Bars, Series, bar, longest_shown, plot
from moe_lightning.report.figures import COLOURS, Figure, colours
from moe_lightning.report.read_bench import Record
from moe_lightning.report.scales import axis, binary

_BOUND = "1 - 1 / chunks"
_WAYS = {"awaited": "pack", "overlapped": "c5", "written to the other's memory": "c2"}


def ep_figures(records: Sequence[Record]) -> list[Figure]:
    """Records of one direction share a figure, so that the links between ranks stand side by side."""
    found = []
    for backward, said in ((False, "forward"), (True, "forward and backward")):
        own = [record for record in records if bool(record.results["settings"].get("backward")) == backward]
        if own:
            found += [_chunks(own, said), _ways(own, said)]
    return found


def _chunks(records: Sequence[Record], said: str) -> Figure:
    """T_comm and eta_overlap over chunks, a line for each strategy on each link."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for case in record.results["cases"]:
            lines.setdefault(f"{case['strategy']}, {_link(record)}", []).append(case)
    colour = colours(lines)
    chunks = sorted({case["chunks"] for cases in lines.values() for case in cases})
    x = axis("chunks", chunks, log=True, marks=chunks, snug=True)
    charts = []
    for title, key, log in (("T_comm, µs", "T_comm", True), ("eta_overlap", "eta_overlap", False)):
        # One chunk overlaps nothing: there eta was not measured.
        own = {name: [case for case in cases if case[key] is not None] for name, cases in lines.items()}
        series = [
            Series(name, colour[name], [c["chunks"] for c in cases], [c[key] for c in cases], "solid points")
            for name, cases in own.items()
            if cases
        ]
        if key == "eta_overlap":
            series.append(Series(_BOUND, "bound", chunks, [1 - 1 / c for c in chunks], "dashed"))
        y = axis("", [value for one in series for value in one.ys], log=log)
        charts.append(plot(title, x, y, series))
    settings = records[0].results["settings"]
    text = (
        f"A layer across ranks, {said}: {settings['tokens']:,} tokens a rank, d_model {settings['d_model']:,}, "
        f"{settings['experts']} experts of {settings['ffn']:,}, top-{settings['top_k']}, {settings['dtype']}. "
        "T_comm is what dispatch and combine take. eta_overlap is the share of the exchange, or of the work if that is "
        "less, that overlap hides; below 0 the chunks cost more than they hide."
    )
    legend = [*colour.items(), (_BOUND, "bound")]
    return Figure(f"Exchange and overlap over chunks, {said}", text, charts, [r.source for r in records], legend)


def _ways(records: Sequence[Record], said: str) -> Figure:
    """The layer's time by the way its rows travel, with the number of chunks that is fastest."""
    charts = []
    for record in records:
        cases = record.results["cases"]
        bars = []
        for strategy in dict.fromkeys(case["strategy"] for case in cases):
            own = [case for case in cases if case["strategy"] == strategy]
            best = min(own, key=lambda case: case["T_overlapped"])
            chunks = f"{best['chunks']} chunk{'s' if best['chunks'] > 1 else ''}"
            bars.append((f"{strategy}, awaited", "awaited", best["T_seq"]))
            bars.append((f"{strategy}, overlapped, {chunks}", "overlapped", best["T_overlapped"]))
            symmetric = [case["symmetric"]["T_layer"] for case in own if case.get("symmetric")]
            if symmetric:
                bars.append((f"{strategy}, written", "written to the other's memory", min(symmetric)))
        longest = longest_shown([us for _, _, us in bars])
        rows = [bar(label, [(way, _WAYS[way], us)], longest, "µs") for label, way, us in bars]
        link = record.results["link"]
        charts.append(Bars(f"{_link(record)}, {link['gb_per_s']:,.0f} GB/s", rows))
    text = f"The whole layer, {said}, µs: exchanges awaited, exchanges beside the experts, rows written without one."
    return Figure(f"Layer by the way rows travel, {said}", text, charts, [r.source for r in records], [*_WAYS.items()])


def link_figures(records: Sequence[Record]) -> list[Figure]:
    """Bandwidth over message size, a chart a record on the same scale."""
    sizes = sorted({row["bytes"] for record in records for row in record.results["rows"]})
    ways = list(dict.fromkeys(row["way"] for record in records for row in record.results["rows"]))
    colour = {way: f"c{i % COLOURS}" for i, way in enumerate(ways)}
    y = axis("", [row["gb_per_s"] for record in records for row in record.results["rows"]], log=True)
    marks = sizes[:: max(1, len(sizes) // 4)]
    x = axis("message", sizes, log=True, marks=marks, snug=True, text=binary)
    charts = []
    for record in records:
        rows = record.results["rows"]
        series = [
            Series(way, colour[way], [r["bytes"] for r in rows if r["way"] == way],
                   [r["gb_per_s"] for r in rows if r["way"] == way], "solid points")
            for way in ways if any(r["way"] == way for r in rows)
        ]  # fmt: skip
        charts.append(plot(f"{_plain(record.results['kind'])}, GB/s", x, y, series))
    text = f"Messages from {binary(sizes[0])} to {binary(sizes[-1])} between two ranks, both axes logarithmic."
    return [Figure("Bandwidth over message size", text, charts, [r.source for r in records], [*colour.items()])]


def scale_figures(records: Sequence[Record]) -> list[Figure]:
    """What the cost model predicts for more ranks."""
    found = []
    for record in records:
        best = record.results["best"]
        ranks = sorted({row["ranks"] for row in best})
        x = axis("ranks", ranks, log=True, marks=ranks, snug=True)
        series, legend = [], []
        for i, skew in enumerate(dict.fromkeys(row["skew"] for row in best)):
            own = sorted((row for row in best if row["skew"] == skew), key=lambda row: row["ranks"])
            name, colour = f"load max / mean {skew:g}", f"c{i % COLOURS}"
            legend.append((name, colour))
            of_ranks = [row["ranks"] for row in own]
            series.append(Series(name, colour, of_ranks, [row["T_overlapped"] for row in own], "solid points"))
            series.append(Series(f"{name}, awaited", colour, of_ranks, [row["T_seq"] for row in own], "dashed"))
        y = axis("", [value for one in series for value in one.ys], from_zero=True)
        text = (
            "Not measured: a cost model fitted to records of a few ranks, asked for its fastest strategy and number of "
            "chunks. Dashed: the same without overlap."
        )
        chart = plot("layer, µs", x, y, series)
        found.append(Figure("Fastest layer by the model", text, [chart], [record.source], legend))
    return found


def _link(record: Record) -> str:
    return _plain(record.results["link"]["kind"])


def _plain(kind: str) -> str:
    """Without the variable in brackets that made it so; the command shows it."""
    return kind.partition(" (")[0]
