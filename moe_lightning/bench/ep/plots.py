"""The expert-parallel benchmark as a picture: where the layer's time goes, what overlap hides, what skew costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lightning.bench.pictures import LINE_COLOURS, MARKERS
from moe_lightning.routers import ROUTERS

Rows = list[dict[str, Any]]
BARS = (
    ("T_seq", "blocking", "#b9bec6"),
    ("T_overlapped", "overlapped", "#3b6fb6"),
    ("T_comm", "T_comm", "#c8553d"),
    ("symmetric", "symmetric", "#3a9a6b"),
)
#: Below it chunks cost more than all that they could hide; how much more does not need the picture's height.
LEAST_ETA = -1.0


def overlap(found: Rows, skewed: Rows, join: dict[str, Any], title: str) -> Figure:
    """Latency, blocking and overlapped, of each strategy; eta over chunks, with its bound; latency against skew."""
    panels = 3 if skewed else 2
    figure = Figure(figsize=(1 + 4.9 * panels, 4.8), layout="constrained")
    axes = figure.subplots(1, panels)
    _latency(axes[0], found)
    _eta(axes[1], found)
    if skewed:
        _skew(axes[2], skewed)
    for panel in axes:
        panel.grid(True, axis="y", alpha=0.25, zorder=0)
        panel.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"{title}\n{join['kind']}, {join['gb_per_s']:,.0f} GB/s", fontsize=11)
    return figure


def _time(row: dict[str, Any], key: str) -> float | None:
    """Of a layer, us; None where it was not measured."""
    return row.get("symmetric", {}).get("T_layer") if key == "symmetric" else row[key]


def _latency(axes: Axes, found: Rows) -> None:
    names = list(dict.fromkeys(row["strategy"] for row in found))
    own = [[row for row in found if row["strategy"] == name] for name in names]
    fastest = [min(rows, key=lambda row: row["T_overlapped"]) for rows in own]  # measured in turn with each other
    written = [next((row for row in rows if row.get("symmetric")), rows[0]) for rows in own]
    for i, (key, label, colour) in enumerate(BARS):
        rows = written if key == "symmetric" else fastest
        heights = [height for row in rows if (height := _time(row, key)) is not None]
        if len(heights) < len(names):
            continue
        places = [j + (i - 1.5) * 0.21 for j in range(len(names))]
        axes.bar(places, heights, 0.2, label=label, color=colour, zorder=2)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(f"{height:,.0f}", (place, height), ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("µs, the best number of chunks")


def _eta(axes: Axes, found: Rows) -> None:
    """On one scale for all pictures; a point below it is a triangle on the lower edge, with its value over it."""
    chunks = sorted({row["chunks"] for row in found})
    measured = [row for row in found if row["eta_overlap"] is not None]
    below: Counter[int] = Counter()
    for i, name in enumerate(ROUTERS):  # a router looks alike in every picture
        own = sorted((row for row in measured if row["strategy"] == name), key=lambda row: row["chunks"])
        if not own:
            continue
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        points = [row["chunks"] for row in own], [row["eta_overlap"] for row in own]
        axes.plot(*points, marker=MARKERS[i % len(MARKERS)], color=colour, label=name)
        for x, eta in zip(*points, strict=True):
            if eta < LEAST_ETA:
                axes.plot(x, LEAST_ETA, marker="v", color=colour, clip_on=False, zorder=3)
                side = -1 if x == chunks[-1] else 1
                axes.annotate(
                    f"{eta:.2f}",
                    (x, LEAST_ETA),
                    xytext=(7 * side, 3 + 10 * below[x]),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    color=colour,
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                )
                below[x] += 1
    axes.plot(chunks, [1 - 1 / c for c in chunks], "--", color="black", linewidth=1.1, label="1 - 1 / chunks")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(chunks)
    axes.set_ylim(LEAST_ETA, max([1.1, *(1.05 * row["eta_overlap"] for row in measured)]))
    axes.set(xlabel="chunks", ylabel="eta_overlap" + (f", cut off below {LEAST_ETA:g}" if below else ""))


def _skew(axes: Axes, skewed: Rows) -> None:
    for i, (key, label, colour) in enumerate(BARS):
        points = [(row["expert_max_over_mean"], t) for row in skewed if (t := _time(row, key)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=MARKERS[i], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="load of the experts, max/mean", ylabel=f"µs, {skewed[0]['strategy']}")
