"""The layer benchmark as a picture: bars of time a shape, a colour a variant, the floor as a line."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from moe_lightning.bench.layer.measure import DIRECTIONS
from moe_lightning.bench.pictures import LINE_COLOURS
from moe_lightning.bench.settings import Settings


def layers(results: list[dict[str, Any]], settings: Settings) -> Figure:
    """A row of panels for each direction, a panel a shape."""
    names = list(dict.fromkeys(row["variant"] for result in results for row in result["rows"]))
    colours = {name: LINE_COLOURS[i % len(LINE_COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(max(6.0, 2.7 * len(results) + 2.2), 7.0), layout="constrained")
    panels = figure.subplots(len(DIRECTIONS), len(results), squeeze=False)
    for direction, panel_row in zip(DIRECTIONS, panels, strict=True):
        for result, axes in zip(results, panel_row, strict=True):
            floor = result["floor_ms"][direction]
            heights = [row[direction]["ms"] for row in result["rows"]]
            top = 1.15 * max([h for h in heights if h <= 6 * min(heights)] + [floor])
            for i, (row, height) in enumerate(zip(result["rows"], heights, strict=True)):
                label = row["variant"] if axes is panels[0][0] else None
                axes.bar(i, min(height, top), 0.75, color=colours[row["variant"]], label=label, zorder=2)
                axes.annotate(f"{height:.3g}" + (" ↑" if height > top else ""), (i, min(height, 0.97 * top)),
                              ha="center", va="bottom" if height < top else "top", fontsize=8)  # fmt: skip
            axes.axhline(floor, ls="--", color="black", linewidth=1.1, zorder=3)
            axes.set_ylim(0, top)
            axes.set_xticks([])
            axes.set_title(
                f"T={result['tokens']}, D={result['d_model']}, F={result['hidden_dim']}\n"
                f"E={result['experts']}, K={result['top_k']}",
                fontsize=9,
            )
            axes.grid(True, axis="y", alpha=0.25, zorder=0)
        panel_row[0].set_ylabel(f"{direction}, ms")
    figure.suptitle(f"MoE layer, {settings.dtype_name}, {settings.device_name}; dashed: the floor", fontsize=12)
    figure.legend(loc="outside lower center", ncols=max(1, int(figure.get_figwidth() // 3)), frameon=False, fontsize=9)
    return figure
