"""Axes: values to percent of a plot's width or height, round ticks, numbers as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


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
        """Where a value stands, 0 at `low`, 100 at `high`."""
        return _percent(value, self.low, self.high, self.log)


def axis(
    name: str,
    values: Iterable[float],
    *,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] | None = None,
    snug: bool = False,
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
        snug: from the least value to the greatest, not from tick to tick.
        least: the axis begins here where a value is below.
        text: of a tick.
    """
    found = sorted(values)
    log = log and bool(found) and found[0] > 0
    low, high = (found[0], found[-1]) if found else (0.0, 1.0)
    if least is not None:
        low, high = max(low, least), max(high, least)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    ticks = list(marks) if marks else _log_ticks(low, high) if log else _round_ticks(low, high)
    if not snug:
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
