"""Figures of `bench ep`, `bench link` and `bench scale`: exchanges between ranks, and what overlap hides of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_lightning.report.bench_records import Record
from moe_lightning.report.charts import Bars, Series, axis, bar, binary, longest_shown, plot, short
from moe_lightning.report.figures import COLOURS, Figure, colours

_BOUND = "1 - 1 / chunks"
#: Below it chunks cost more than all that they could hide.
_LEAST_ETA = -1.0
_WAYS = {"blocking": "pack", "overlapped": "c5", "symmetric memory": "c2"}


def ep_figures(records: Sequence[Record]) -> list[Figure]:
    """Records of the same work share a figure, so that the links between ranks can be compared."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        settings = record.results["settings"]
        sizes = tuple(
            settings[name] for name in ("tokens", "d_model", "num_experts", "mlp_hidden_dim", "top_k", "dtype")
        )
        groups.setdefault((bool(settings.get("backward")), record.results["link"]["ranks"], *sizes), []).append(record)
    return [figure for key, own in sorted(groups.items()) for figure in _of_one_size(own, *key)]


def _of_one_size(
    records: Sequence[Record],
    backward: bool,
    ranks: int,
    tokens: int,
    d_model: int,
    experts: int,
    ffn: int,
    top_k: int,
    dtype: str,
) -> list[Figure]:
    direction = "forward and backward" if backward else "forward"
    work = (
        f"{tokens:,} tokens on each of {ranks} ranks, d_model {d_model:,}, {experts} experts of {ffn:,}, top-{top_k}, "
        f"{dtype}"
    )
    return [_chunks(records, direction, work), _ways(records, direction, work)]


def _named(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Records by their links, and by their files too where links are the same."""
    links = [_link(record) for record in records]
    return [
        (f"{link} ({record.source.name})" if links.count(link) > 1 else link, record)
        for link, record in zip(links, records, strict=True)
    ]


def _chunks(records: Sequence[Record], direction: str, work: str) -> Figure:
    """T_comm and eta_overlap over chunks, a line for each router on each link."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for link, record in _named(records):
        for case in sorted(record.results["cases"], key=lambda case: case["chunks"]):
            lines.setdefault(f"{case['router']}, {link}", []).append(case)
    colour = colours(lines)
    chunks = sorted({case["chunks"] for cases in lines.values() for case in cases})
    x = axis("chunks", chunks, log=True, marks=chunks, tight=True)
    charts = []
    for title, key in (("T_comm, µs", "T_comm"), ("eta_overlap", "eta_overlap")):
        # One chunk overlaps nothing: there eta was not measured.
        points = {
            name: ([case["chunks"] for case in known], [case[key] for case in known])
            for name, cases in lines.items()
            if (known := [case for case in cases if case[key] is not None])
        }
        same_end = len({xs[-1] for xs, _ in points.values()}) == 1
        series = [
            Series(name, colour[name], xs, ys, "solid points", "" if same_end else f"at {xs[-1]}")
            for name, (xs, ys) in points.items()
        ]
        if key == "eta_overlap":
            series.append(Series(_BOUND, "bound", chunks, [1 - 1 / c for c in chunks], "dashed"))
        values = [value for one in series for value in one.ys]
        y = axis("", [*values, _LEAST_ETA, 1], least=_LEAST_ETA) if key == "eta_overlap" else axis("", values, log=True)
        charts.append(plot(title, x, y, series))
    text = (
        f"A layer across ranks, {direction}: {work}. T_comm is what dispatch and combine take. eta_overlap is the "
        "share of the exchange, or of the work if that is less, that overlap hides; below 0 the chunks cost more than "
        f"they hide. The scale ends at {short(_LEAST_ETA)}: what is below is written at the edge."
    )
    legend = [*colour.items(), (_BOUND, "bound")]
    return Figure(f"Exchange and overlap over chunks, {direction}", text, charts, [r.source for r in records], legend)


def _ways(records: Sequence[Record], direction: str, work: str) -> Figure:
    """The layer's time by the way its rows travel, with the fastest number of chunks; one scale for all links."""
    of_links = []
    for link, record in _named(records):
        cases = record.results["cases"]
        bars = []
        for router in dict.fromkeys(case["router"] for case in cases):
            own = [case for case in cases if case["router"] == router]
            best = min(own, key=lambda case: case["T_overlapped"])
            chunks = f"{best['chunks']} chunk{'s' if best['chunks'] > 1 else ''}"
            bars.append((f"{router}, blocking", "blocking", best["T_seq"]))
            bars.append((f"{router}, overlapped, {chunks}", "overlapped", best["T_overlapped"]))
            symmetric = [case["symmetric"]["T_layer"] for case in own if case.get("symmetric")]
            if symmetric:
                bars.append((f"{router}, symmetric", "symmetric memory", min(symmetric)))
        of_links.append((f"{link}, {record.results['link']['gb_per_s']:,.0f} GB/s", bars))
    longest = longest_shown([us for _, bars in of_links for _, _, us in bars])
    charts = [
        Bars(title, [bar(label, [(way, _WAYS[way], us)], longest, "µs") for label, way, us in bars])
        for title, bars in of_links
    ]
    text = (
        f"The whole layer, {direction}, µs: {work}. Blocking exchanges, exchanges "
        "overlapped with the experts, rows written to other ranks' memory; all charts on one scale."
    )
    return Figure(
        f"Layer by the way rows travel, {direction}", text, charts, [r.source for r in records], [*_WAYS.items()]
    )


def link_figures(records: Sequence[Record]) -> list[Figure]:
    """Bandwidth over message size, a chart per record on the same scale."""
    sizes = sorted({row["bytes"] for record in records for row in record.results["rows"]})
    ways = list(dict.fromkeys(row["way"] for record in records for row in record.results["rows"]))
    colour = {way: f"c{i % COLOURS}" for i, way in enumerate(ways)}
    y = axis("", [row["gb_per_s"] for record in records for row in record.results["rows"]], log=True)
    marks = sizes[:: max(1, len(sizes) // 4)]
    x = axis("message", sizes, log=True, marks=marks, tight=True, text=binary)
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
    figures = []
    for record in records:
        best = record.results["best"]
        ranks = sorted({row["ranks"] for row in best})
        x = axis("ranks", ranks, log=True, marks=ranks, tight=True)
        series, legend = [], []
        for i, skew in enumerate(dict.fromkeys(row["skew"] for row in best)):
            own = sorted((row for row in best if row["skew"] == skew), key=lambda row: row["ranks"])
            name, colour = f"load max / mean {skew:g}", f"c{i % COLOURS}"
            legend.append((name, colour))
            of_ranks = [row["ranks"] for row in own]
            series.append(Series(name, colour, of_ranks, [row["T_overlapped"] for row in own], "solid points"))
            series.append(Series(f"{name}, blocking", colour, of_ranks, [row["T_seq"] for row in own], "dashed"))
        y = axis("", [value for one in series for value in one.ys], from_zero=True)
        text = (
            "Not measured: a cost model fitted to records of a few ranks: its fastest router and number of "
            "chunks. Dashed: the same without overlap."
        )
        chart = plot("layer, µs", x, y, series)
        figures.append(Figure("Fastest layer by the model", text, [chart], [record.source], legend))
    return figures


def _link(record: Record) -> str:
    return _plain(record.results["link"]["kind"])


def _plain(kind: str) -> str:
    """Without the variable in brackets that made it so; the command shows it."""
    return kind.partition(" (")[0]
