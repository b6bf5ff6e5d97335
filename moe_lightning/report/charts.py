"""Charts as plain data in percent, for the template to draw: lines and points as SVG, bars and heat maps as HTML.

With their axes: round ticks, numbers as they are read.

The SVG is stretched to its box and the text is around it as HTML, so a chart fits a phone without small print.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_lightning.callbacks.expert_load import LOAD_CAP
from moe_lightning.report.events import Load
from moe_lightning.report.figures import DASH, MINUS

#: Points of one line that the page keeps; more are averaged.
MOST_POINTS = 300
#: Ratios of one heat map, all its steps together, that the page keeps.
MOST_RATIOS = 60_000
#: Least distance of two labels at the ends of lines, percent of a plot's height.
_APART = 6.5


@dataclass(frozen=True)
class Series:
    """One line to draw: a name, a colour class of the style sheet, and points."""

    name: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "solid"
    """solid, dashed; and points, which marks them; and end, which marks the last."""
    end_note: str = ""
    """Beside the last value, where those of other lines are of other steps."""


@dataclass(frozen=True)
class Line:
    """A series in percent; `tips` are (x, y, text of x, text of y)."""

    name: str
    colour: str
    style: str
    path: str
    dots: list[tuple[float, float]]
    tips: list[tuple[float, float, str, str]]
    end: str
    under: int = 0
    """How many later lines run along this one and would cover it: it is drawn the wider."""


@dataclass(frozen=True)
class Plot:
    """Lines over two axes."""

    title: str
    x: Axis
    y: Axis
    lines: list[Line]
    ends: list[tuple[float, str, str]]
    """Labels right of the plot: height in percent, text, colour class."""
    off_scale: list[tuple[float, float, str, str]]
    """Figures of points below the axis, over the place where they would be: x and height in percent, text, class."""
    kind: str = "plot"

    @property
    def wide_ends(self) -> bool:
        """Whether the labels need more room than a number's."""
        return any(len(text) > 5 for _, text, _ in self.ends)

    @property
    def tips(self) -> list[dict[str, Any]]:
        """For the page's script."""
        return [{"name": line.name, "colour": line.colour, "points": line.tips} for line in self.lines if line.tips]


@dataclass(frozen=True)
class Segment:
    """Part of a bar: percent of the longest, and the tooltip."""

    name: str
    colour: str
    width: float
    tip: str


@dataclass(frozen=True)
class Bar:
    """A row of segments; `bound` is the roofline bound, in percent, if that is within the scale."""

    label: str
    segments: list[Segment]
    text: str
    bound: float | None = None
    cut: bool = False
    """Longer than the chart shows: drawn with a break."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars on one scale."""

    title: str
    rows: list[Bar]
    note: str = ""
    kind: str = "bars"


@dataclass(frozen=True)
class HeatMap:
    """Load over the layer's mean load in percent, a frame per step, row by row, on the scale of all heat maps."""

    title: str
    colour: str
    layers: int
    experts: int
    steps: list[int]
    ratios: list[list[int]]
    kind: str = "heat"

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Of the last step: class and opacity; the page's script does the same for the others."""
        return [_cell(r / 100) for r in self.ratios[-1]]


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column is a name."""

    head: list[str]
    rows: list[list[str]]
    kind: str = "table"


@dataclass(frozen=True)
class Strip:
    """A row of marks on an axis they all share."""

    label: str
    note: str
    marks: list[tuple[float, str, str]]
    """Percent, colour class, the tooltip."""
    text: str


@dataclass(frozen=True)
class Strips:
    """Rows of marks, to compare figures that lie decades apart."""

    title: str
    x: Axis
    rows: list[Strip]
    kind: str = "strips"


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series], *, label_ends: bool = True) -> Plot:
    """Place every series on the axes; figures of points below y's range are written, over their place or at the end."""
    lines: list[Line] = []
    places: list[list[tuple[float, float]]] = []
    off_scale = []
    stacked: Counter[float] = Counter()
    for one in series:
        xs, ys = _thin(one.xs, one.ys)
        at = [(x.percent(a), y.percent(b)) for a, b in zip(xs, ys, strict=True)]
        path = "M" + "L".join(f"{a:g} {100 - b:g}" for a, b in at) if len(at) > 1 and one.style != "points" else ""
        dots = [(a, b) for a, b in at if b >= 0] if "points" in one.style else []
        tips = [(a, max(b, 0.0), f"{x.name} {x.text(u)}", number(v)) for (a, b), u, v in zip(at, xs, ys, strict=True)]
        marked = [("\N{DOWNWARDS ARROW}" if b < 0 else "") + number(v) for (_, b), v in zip(at, ys, strict=True)]
        for (a, b), text in list(zip(at, marked, strict=True))[: -1 if label_ends else None]:
            if b < 0:
                off_scale.append((a, _APART * stacked[a], text, one.colour))
                stacked[a] += 1
        lines.append(Line(one.name, one.colour, one.style, path, dots, tips, f"{marked[-1]} {one.end_note}".rstrip()))
        places.append(at)
    lines = [
        replace(line, under=sum(_coincide(places[i], other) for other in places[i + 1 :]))
        for i, line in enumerate(lines)
    ]
    ends = [(line.tips[-1][1], line.end, line.colour) for line in lines if line.style != "dashed"]
    return Plot(title, x, y, lines, _apart(ends) if label_ends else [], off_scale)


def bar(
    label: str, parts: Sequence[tuple[str, str, float]], longest: float, unit: str, bound: float | None = None
) -> Bar:
    """Segments (name, colour, value) of a bar on a scale that ends at `longest`.

    Of a bar that is cut there, and of a bound that lies beyond, the text has the figure.
    """
    total, room, segments = sum(value for _, _, value in parts), longest, []
    for name, colour, value in parts:
        shown, room = min(value, room), max(0.0, room - value)
        if shown > 0:
            tip = f"{name}: {number(value)} {unit}"
            segments.append(Segment(name, colour, round(100 * shown / longest, 2), tip))
    beyond = bound is not None and bound > longest
    at = None if bound is None or beyond else round(100 * bound / longest, 2)
    text = number(total) + (f", roofline {number(bound)}" if beyond else "")
    return Bar(label, segments, text, at, cut=total > longest * 1.0001)


def longest_shown(totals: Sequence[float], bounds: Sequence[float] = ()) -> float:
    """Where the scale of bars ends: a bar over five times the shortest is cut off, or the others could not be seen."""
    most = max(5 * min(totals), min(bounds, default=0.0))
    return max(value for value in (*totals, *bounds, 0.0) if value <= most) or max(totals) or 1.0


def heat_map(title: str, colour: str, loads: Sequence[Load]) -> HeatMap:
    """Frames evenly chosen from the loads, the last one among them."""
    layers, experts = loads[0].counts_LE.shape
    most = min(len(loads), max(2, MOST_RATIOS // (layers * experts)))
    chosen = [loads[i] for i in sorted({round(i) for i in np.linspace(0, len(loads) - 1, most)})]
    ratios = []
    for load in chosen:
        means_L1 = np.maximum(load.counts_LE.mean(1, keepdims=True), 1e-9)
        ratios.append([round(float(r)) for r in (100 * load.counts_LE / means_L1).ravel()])
    return HeatMap(title, colour, layers, experts, [load.step for load in chosen], ratios)


def _coincide(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> bool:
    """Whether two lines are less than a percent apart over most of what they share."""
    heights = dict(b)
    apart = [abs(y - heights[x]) for x, y in a if x in heights]
    return len(apart) > 1 and sum(d < 1 for d in apart) > len(apart) / 2


def _cell(ratio: float) -> tuple[str, float]:
    """Class and opacity: 0 at the mean, 1 at LOAD_CAP times or one LOAD_CAP-th of it, a colour of its own beyond."""
    if ratio > LOAD_CAP or ratio < 1 / LOAD_CAP:
        return ("above" if ratio > 1 else "below"), 1.0
    return ("hot" if ratio > 1 else "cold"), round(abs(math.log(ratio, LOAD_CAP)), 2)


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that at most MOST_POINTS stay; the last point stays as it is."""
    each = math.ceil(len(xs) / MOST_POINTS)
    if each <= 1:
        return list(xs), list(ys)
    cuts = range(0, len(xs) - 1, each)
    means = [[sum(part) / len(part) for part in (v[i : min(i + each, len(v) - 1)] for i in cuts)] for v in (xs, ys)]
    return [*means[0], xs[-1]], [*means[1], ys[-1]]


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels from the lowest up, each at least `_APART` over the one below, pushed back down from the top."""
    placed: list[tuple[float, str, str]] = []
    for height, text, colour in sorted(ends):
        height = max(height, placed[-1][0] + _APART) if placed else height
        placed.append((height, text, colour))
    over = max(0.0, placed[-1][0] - 100) if placed else 0.0
    return [(round(height - over, 2), text, colour) for height, text, colour in placed]


def number(value: float | None, digits: int = 3) -> str:
    """With `digits` significant digits, thousands apart, a dash for None, NaN and ∞ as they are."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{MINUS if value < 0 else ''}\N{INFINITY}"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.replace("-", MINUS)


def short(value: float) -> str:
    """A tick or a size: 2,048, 12k, 3.5 M."""
    if float(value).is_integer() and abs(value) < 1e5:
        return f"{value:,.0f}".replace("-", MINUS)
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}".replace("-", MINUS)


def binary(value: float) -> str:
    """Bytes in powers of 1024: 64 KiB."""
    power = min(3, int(math.log2(value) // 10)) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, linear or logarithmic, with ticks (position in percent, text)."""

    name: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    text: Callable[[float], str] = short
    """Of a value on it."""

    def percent(self, value: float) -> float:
        """The position of a value, 0 at `low`, 100 at `high`."""
        return _percent(value, self.low, self.high, self.log)


def axis(
    name: str,
    values: Iterable[float],
    *,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] | None = None,
    tight: bool = False,
    least: float | None = None,
    text: Callable[[float], str] = short,
) -> Axis:
    """An axis that holds all values, or those from `least` on.

    Args:
        name: its title.
        values: what is drawn along it.
        log: logarithmic, if all values are positive.
        from_zero: 0 belongs to it.
        marks: the ticks, where values are few and known; None: round ones.
        tight: from the least value to the greatest, not from tick to tick.
        least: the axis begins here where a value is below.
        text: of a tick.
    """
    ordered = sorted(values)
    log = log and bool(ordered) and ordered[0] > 0
    low, high = (ordered[0], ordered[-1]) if ordered else (0.0, 1.0)
    if least is not None:
        low, high = max(low, least), max(high, least)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    ticks = list(marks) if marks else _log_ticks(low, high) if log else _round_ticks(low, high)
    if not tight:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    shown = tuple((_percent(tick, low, high, log), text(tick)) for tick in ticks if low <= tick <= high)
    return Axis(name, low, high, log, shown, text)


def _percent(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return round(100 * (value - low) / (high - low), 2)


def _round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the range."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """A few of each decade, the fewer the more decades there are, enclosing the range."""
    decades = math.log10(high / low)
    factors: tuple[float, ...]
    factors = (
        (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    )
    every = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for factor in factors
    ]
    first = max((tick for tick in every if tick <= low * 1.001), default=every[0])
    last = min((tick for tick in every if tick >= high * 0.999), default=every[-1])
    return [tick for tick in every if first <= tick <= last]
