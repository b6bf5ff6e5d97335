"""Pictures of the benchmarks, by matplotlib; charts of the report are drawn by `moe_lightning.report`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from moe_lightning.bench.cli import Settings
from moe_lightning.bench.timers import COLUMN_NAMES, headline, timed_as
from moe_lightning.routers import ROUTERS

DPI = 150
LINE_COLOURS = ("#3b6fb6", "#c8553d", "#3a9a6b", "#8c6bb1", "#e08b2c", "#555555")
MARKERS = "osD^vP"

Rows = list[dict[str, Any]]


def save(figure: Figure, path: str) -> None:
    """Write the picture; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


MOST_HIGHER = 5  # times the lowest bar: a higher one is cut off, or the others could not be seen
STACKED = ("T_logit", "T_select", "T_index", "T_permute", "T_pack", "T_unpack")
PART_COLOURS = dict(zip(STACKED, ("#3b6fb6", "#e08b2c", "#8c6bb1", "#3a9a6b", "#3a9a6b", "#b9bec6"), strict=True))


def routes(results: Rows, settings: Settings) -> Figure:
    """T_route over tokens where tokens were swept, else the parts of each router as stacked bars.

    A column of panels for each other combination of sizes, a row for each direction.
    """
    groups: dict[tuple[int, ...], Rows] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in ("d_model", "num_experts", "top_k")), []).append(result)
    directions = ("forward", "backward") if settings.backward else ("forward",)
    swept = len({result["tokens"] for result in results}) > 1
    size = (max(7.4, 5.8 * len(groups)), 4.4 * len(directions) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(directions), len(groups), squeeze=False)
    for direction, panel_row in zip(directions, panels, strict=True):
        for (key, group), axes in zip(groups.items(), panel_row, strict=True):
            (_over_tokens if swept else _stacked)(axes, group, direction, COLUMN_NAMES[settings.device.type])
            sizes = f"D={key[0]}, E={key[1]}, K={key[2]}"
            tokens = "" if swept else f"T={group[0]['tokens']}, "
            axes.set_title(f"{direction}: {tokens}{sizes}", fontsize=11)
    figure.suptitle(f"Cost of routing, {settings.dtype_name}, {settings.device_name}", fontsize=13)
    return figure


def _over_tokens(axes: Axes, group: Rows, direction: str, names: dict[str, str]) -> None:
    rows = [result[direction]["parts"].get("T_route") for result in group]
    column = headline(*(row for row in rows if row))
    for i, router in enumerate(dict.fromkeys(result["router"] for result in group)):
        points = [
            (r["tokens"], row[column]) for r, row in zip(group, rows, strict=True) if r["router"] == router and row
        ]
        colour, marker = LINE_COLOURS[i % len(LINE_COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=colour, label=router)
    # Masked movement has a lower roofline bound, as it moves nothing: the line is of the routers that permute.
    bounds: dict[int, float] = {}
    for result, row in zip(group, rows, strict=True):
        if row:
            bounds[result["tokens"]] = max(bounds.get(result["tokens"], 0.0), row["roofline_us"])
    axes.plot(*zip(*sorted(bounds.items()), strict=True), "--", color="black", linewidth=1.2, label="roofline")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"T_route, µs ({names[column]})")
    _token_ticks(axes, sorted(bounds))
    _microsecond_ticks(axes)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)


def _stacked(axes: Axes, group: Rows, direction: str, columns: dict[str, str]) -> None:
    parts = [result[direction]["parts"] for result in group]
    shown = [name for name in STACKED if any(name in p for p in parts)]
    if direction == "forward":
        shown.remove("T_pack")  # it is T_index + T_permute
    column = headline(*(p[name] for p in parts for name in shown if name in p))
    names = [result["router"] for result in group]
    bottoms = [0.0] * len(group)
    for name in shown:
        heights = [p[name][column] if name in p else 0.0 for p in parts]
        axes.bar(names, heights, 0.6, bottoms, label=name, color=PART_COLOURS[name], zorder=2)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    top = 1.12 * max(bottom for bottom in bottoms if bottom <= MOST_HIGHER * min(bottoms))
    axes.set_ylim(0, top)
    for i, p in enumerate(parts):
        bound = sum(p[name]["roofline_us"] for name in shown if name in p)
        label = "roofline of these" if i == 0 else None
        axes.plot([i - 0.38, i + 0.38], [bound, bound], "--", color="black", linewidth=1.2, label=label, zorder=3)
        cut = bottoms[i] > top
        text = f"{bottoms[i]:,.0f}" + (f" ↑\nroofline {bound:,.0f}" if cut else "")
        box = {"fc": "white", "ec": "none", "pad": 1.5} if cut else None
        axes.annotate(text, (i, min(bottoms[i], top)), ha="center", va="top" if cut else "bottom", fontsize=9,
                      xytext=(0, -4 if cut else 2), textcoords="offset points", bbox=box, zorder=4)  # fmt: skip
    axes.set(ylabel=f"µs ({columns[column]})")
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(True, axis="y", alpha=0.25, zorder=0)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def permutation(rows: Rows, settings: Settings) -> Figure:
    """Latency and share of the copy bandwidth over tokens, a line for each variant."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    latency, share = figure.subplots(1, 2)
    tokens = sorted({row["tokens"] for row in rows})
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["tokens"])
        style = {"marker": MARKERS[i], "color": LINE_COLOURS[i], "label": variant}
        latency.plot([row["tokens"] for row in own], [row["us"] for row in own], **style)
        share.plot([row["tokens"] for row in own], [100 * row["bandwidth_share"] for row in own], **style)
    bounds = {row["tokens"]: row["roofline_us"] for row in rows}
    latency.plot(tokens, [bounds[t] for t in tokens], "--", color="black", linewidth=1.2, label="roofline")
    share.axhline(100, ls="--", color="black", linewidth=1.2, label="measured copy")
    latency.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel=f"T_permute, µs ({timed_as(rows, settings.device)})"
    )
    share.set(xscale="log", xlabel="tokens", ylabel="share of the copy bandwidth, %", ylim=(0, None))
    _microsecond_ticks(latency)
    for axes in (latency, share):
        _token_ticks(axes, tokens)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False)
    first = rows[0]
    figure.suptitle(
        f"Permutation: D={first['d_model']}, E={first['num_experts']}, K={first['top_k']}, "
        f"{settings.dtype_name}, {settings.device_name}",
        fontsize=13,
    )
    return figure


def _token_ticks(axes: Axes, tokens: list[int]) -> None:
    """The swept values and no others."""
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=0 if len(tokens) < 6 else 30)
    axes.minorticks_off()


def _microsecond_ticks(axes: Axes) -> None:
    """1, 2 and 5 of each decade, written out."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,g}"))


BARS = (
    ("T_seq", "blocking", "#b9bec6"),
    ("T_overlapped", "overlapped", "#3b6fb6"),
    ("T_comm", "T_comm", "#c8553d"),
    ("symmetric", "symmetric", "#3a9a6b"),
)
#: Below it chunks cost more than all that they could hide; how much more does not need the picture's height.
LEAST_ETA = -1.0


def overlap(cases: Rows, skewed: Rows, link: dict[str, Any], title: str) -> Figure:
    """Latency, blocking and overlapped, of each router; eta over chunks, with its bound; latency against skew."""
    panels = 3 if skewed else 2
    figure = Figure(figsize=(1 + 4.9 * panels, 4.8), layout="constrained")
    axes = figure.subplots(1, panels)
    _latency(axes[0], cases)
    _eta(axes[1], cases)
    if skewed:
        _skew(axes[2], skewed)
    for panel in axes:
        panel.grid(True, axis="y", alpha=0.25, zorder=0)
        panel.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"{title}\n{link['kind']}, {link['gb_per_s']:,.0f} GB/s", fontsize=11)
    return figure


def _time(row: dict[str, Any], key: str) -> float | None:
    """Of a layer, us; None where it was not measured."""
    return row.get("symmetric", {}).get("T_layer") if key == "symmetric" else row[key]


def _latency(axes: Axes, cases: Rows) -> None:
    names = list(dict.fromkeys(row["router"] for row in cases))
    own = [[row for row in cases if row["router"] == name] for name in names]
    fastest = [min(rows, key=lambda row: row["T_overlapped"]) for rows in own]  # measured interleaved
    symmetric = [next((row for row in rows if row.get("symmetric")), rows[0]) for rows in own]
    for i, (key, label, colour) in enumerate(BARS):
        rows = symmetric if key == "symmetric" else fastest
        heights = [height for row in rows if (height := _time(row, key)) is not None]
        if len(heights) < len(names):
            continue
        places = [j + (i - 1.5) * 0.21 for j in range(len(names))]
        axes.bar(places, heights, 0.2, label=label, color=colour, zorder=2)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(f"{height:,.0f}", (place, height), ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("µs, the best number of chunks")


def _eta(axes: Axes, cases: Rows) -> None:
    """On one scale for all pictures; a point below it is a triangle on the lower edge, with its value over it."""
    chunks = sorted({row["chunks"] for row in cases})
    measured = [row for row in cases if row["eta_overlap"] is not None]
    below: Counter[int] = Counter()
    for i, name in enumerate(ROUTERS):  # a router has the same colour and marker in every picture
        own = sorted((row for row in measured if row["router"] == name), key=lambda row: row["chunks"])
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
    axes.set(xlabel="load of the experts, max/mean", ylabel=f"µs, {skewed[0]['router']}")


def layers(results: Rows, settings: Settings) -> Figure:
    """Bars of time: a row of panels per direction, a panel per shape, a colour per variant; the roofline as a line."""
    names = list(dict.fromkeys(row["variant"] for result in results for row in result["rows"]))
    colours = {name: LINE_COLOURS[i % len(LINE_COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(max(6.0, 2.7 * len(results) + 2.2), 7.0), layout="constrained")
    directions = results[0]["roofline_ms"]
    panels = figure.subplots(len(directions), len(results), squeeze=False)
    for direction, panel_row in zip(directions, panels, strict=True):
        for result, axes in zip(results, panel_row, strict=True):
            bound = result["roofline_ms"][direction]
            heights = [row[direction]["ms"] for row in result["rows"]]
            top = 1.15 * max([h for h in heights if h <= 6 * min(heights)] + [bound])
            for i, (row, height) in enumerate(zip(result["rows"], heights, strict=True)):
                label = row["variant"] if axes is panels[0][0] else None
                axes.bar(i, min(height, top), 0.75, color=colours[row["variant"]], label=label, zorder=2)
                axes.annotate(f"{height:.3g}" + (" ↑" if height > top else ""), (i, min(height, 0.97 * top)),
                              ha="center", va="bottom" if height < top else "top", fontsize=8)  # fmt: skip
            axes.axhline(bound, ls="--", color="black", linewidth=1.1, zorder=3)
            axes.set_ylim(0, top)
            axes.set_xticks([])
            axes.set_title(
                f"T={result['tokens']}, D={result['d_model']}, F={result['mlp_hidden_dim']}\n"
                f"E={result['num_experts']}, K={result['top_k']}",
                fontsize=9,
            )
            axes.grid(True, axis="y", alpha=0.25, zorder=0)
        panel_row[0].set_ylabel(f"{direction}, ms")
    figure.suptitle(f"MoE layer, {settings.dtype_name}, {settings.device_name}; dashed: the roofline", fontsize=12)
    figure.legend(loc="outside lower center", ncols=max(1, int(figure.get_figwidth() // 3)), frameon=False, fontsize=9)
    return figure


def bandwidth(rows: Rows, kind: str) -> Figure:
    """GB/s over message size, a line per way."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        points = [(row["bytes"] / 1024, row["gb_per_s"]) for row in rows if row["way"] == way]
        axes.plot(*zip(*points, strict=True), marker=MARKERS[i], color=LINE_COLOURS[i], label=way)
    axes.set(xscale="log", xlabel="KiB per direction", ylabel="GB/s per direction", title=kind)
    axes.set_ylim(bottom=0)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    return figure


def scale(rows: Rows, measured: Rows) -> Figure:
    """Time of the fastest layer over ranks by the cost model, a line per skew, with what was measured."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, skew in enumerate(dict.fromkeys(row["skew"] for row in rows)):
        own = [row for row in rows if row["skew"] == skew]
        ranks = [row["ranks"] for row in own]
        style: dict[str, Any] = {"color": LINE_COLOURS[i % len(LINE_COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(ranks, [row["T_seq"] for row in own], linestyle="--", alpha=0.6, **style)
        axes.plot(ranks, [row["T_overlapped"] for row in own], label=f"skew {skew:g}", **style)
    fastest: dict[int, float] = {}
    for row in measured:
        if row["what"] == "T_overlapped":
            fastest[row["ranks"]] = min(row["measured_us"], fastest.get(row["ranks"], float("inf")))
    axes.plot([*fastest], [*fastest.values()], "x", color="black", markersize=9, zorder=3, label="fastest measured")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["ranks"] for row in rows}), sorted({row["ranks"] for row in rows}))
    axes.set(xlabel="ranks", ylabel="µs per layer", title="fastest layer by the model; dashed: without overlap")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)
    return figure


#: Of a step, from the bottom of its bar.
STEP_PARTS = {
    "T_logit": "#1f4e8c", "T_select": "#e08b2c", "T_pack": "#8c6bb1", "T_unpack": "#c9b3dd", "T_experts": "#3b6fb6",
    "feed-forward": "#7fa6d6", "rest": "#3a9a6b", "head and loss": "#c8553d", "optimizer": "#555555",
    "host gaps": "#d9dce1",
}  # fmt: skip


def steps(rows: Rows, title: str) -> Figure:
    """A bar per variant, its parts one on the other, with the time of the step and its ratio to the dense model."""
    figure = Figure(figsize=(max(7.4, 1.1 * len(rows) + 2.5), 5.2), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    places = [i + 0.6 * models.index(row["model"]) for i, row in enumerate(rows)]
    bottoms = [0.0] * len(rows)
    for name, colour in STEP_PARTS.items():
        heights = [max(0.0, _of_step(row, name)) for row in rows]
        if any(heights):
            axes.bar(places, heights, 0.75, bottoms, label=name, color=colour, zorder=2)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, row, top in zip(places, rows, bottoms, strict=True):
        ratio = "" if row["x_dense"] is None or row["model"] == "dense" else f"\n{row['x_dense']:.2f} x dense"
        axes.annotate(f"{row['ms']:,.3g} ms{ratio}", (place, max(top, row["ms"])), ha="center", va="bottom", fontsize=8)
    axes.plot(places, [row["ms"] for row in rows], "_", color="black", markersize=26, label="step", zorder=3)
    axes.set_ylim(0, 1.15 * max([*bottoms, *(row["ms"] for row in rows)]))
    axes.set_xticks(places, [f"{row['form']}\n{row['model']}" for row in rows], fontsize=8)
    axes.set(ylabel="ms per optimizer step")
    axes.grid(True, axis="y", alpha=0.25, zorder=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    return figure


def _of_step(row: dict[str, Any], name: str) -> float:
    return (row["host_gaps_ms"] if name == "host gaps" else row["parts_ms"].get(name)) or 0.0
