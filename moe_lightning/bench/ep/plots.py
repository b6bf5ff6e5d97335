"""The expert-parallel benchmark as a picture: where the layer's time goes, and what overlap hides."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from moe_lightning.bench.pictures import LINE_COLOURS, MARKERS


def overlap(found: list[dict[str, Any]], join: dict[str, Any], title: str) -> Figure:
    """Latency, blocking and overlapped, of each strategy; eta over chunks, with its bound."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    latency, eta = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["strategy"] for row in found))
    chunks = sorted({row["chunks"] for row in found})
    best = {name: min((r for r in found if r["strategy"] == name), key=lambda r: r["T_overlapped"]) for name in names}
    bars = (
        ("T_seq", "blocking", "#b9bec6"),
        ("T_overlapped", "overlapped", "#3b6fb6"),
        ("T_comm", "T_comm", "#c8553d"),
    )
    for i, (key, label, colour) in enumerate(bars):
        heights = [best[name][key] for name in names]
        places = [j + (i - 1) * 0.27 for j in range(len(names))]
        latency.bar(places, heights, 0.25, label=label, color=colour, zorder=2)
        for place, height in zip(places, heights, strict=True):
            latency.annotate(f"{height:,.0f}", (place, height), ha="center", va="bottom", fontsize=8)
    latency.set_xticks(range(len(names)), names)
    latency.set_ylabel("µs")
    for i, name in enumerate(names):
        own = sorted((row for row in found if row["strategy"] == name), key=lambda row: row["chunks"])
        points = [row["chunks"] for row in own], [row["eta_overlap"] for row in own]
        eta.plot(*points, marker=MARKERS[i % len(MARKERS)], color=LINE_COLOURS[i % len(LINE_COLOURS)], label=name)
    eta.plot(chunks, [1 - 1 / c for c in chunks], "--", color="black", linewidth=1.1, label="1 - 1 / chunks")
    eta.axhline(0, color="#888888", linewidth=0.8)
    eta.set_xticks(chunks)
    eta.set(xlabel="chunks", ylabel="eta_overlap")
    for axes in (latency, eta):
        axes.grid(True, axis="y", alpha=0.25, zorder=0)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}\n{join['kind']}, {join['gb_per_s']:,.0f} GB/s", fontsize=11)
    return figure
