"""The rounds of one time: median, quartiles, whether they lie too far apart to tell, and parts against their whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from rich.console import Console

FEWEST_ROUNDS = 3  # fewer have no spread worth the name
#: Quartiles further apart than this share of the median: too noisy to tell.
MOST_IQR = 0.20
#: So are medians of the first and the second half of the rounds further apart than this: the machine changed meanwhile.
MOST_DRIFT = 0.10
TOO_NOISY = "too noisy to tell"


@dataclass(frozen=True)
class Spread:
    """Of the rounds of one time, in its unit."""

    q1: float
    median: float
    q3: float
    first: float
    """Median of the first half of the rounds, in the order of time."""
    second: float
    """Of the second half; the middle one of an odd number is in neither."""
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of one or more samples, in the order in which they were taken."""
        half = max(1, len(samples) // 2)
        q1, _, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * [samples[0]]
        return cls(q1, median(samples), q3, median(samples[:half]), median(samples[-half:]), len(samples))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Spread:
        """What `as_record` wrote."""
        return cls(**{name: value for name, value in record.items() if name != "noisy"})

    def scaled(self, factor: float, offset: float = 0.0) -> Spread:
        """Of `factor * (sample + offset)`."""

        def scale(value: float) -> float:
            return factor * (value + offset)

        ends = scale(self.q1), scale(self.median), scale(self.q3)
        return Spread(*ends, scale(self.first), scale(self.second), self.rounds)

    def __add__(self, other: Spread) -> Spread:
        """Of a sum, as if all that slows one part slowed the other too: its quartiles are no further apart."""
        ends = self.q1 + other.q1, self.median + other.median, self.q3 + other.q3
        rounds = min(self.rounds, other.rounds)
        return Spread(*ends, self.first + other.first, self.second + other.second, rounds)

    def as_record(self) -> dict[str, Any]:
        """For a JSON record."""
        return vars(self) | {"noisy": self.doubt is not None}

    @property
    def range(self) -> tuple[float, float]:
        """From the least to the most of the quartiles and of both halves' medians."""
        ends = self.q1, self.q3, self.first, self.second
        return min(ends), max(ends)

    @property
    def doubt(self) -> str | None:
        """Why the time is too noisy to tell anything by; None if it is not."""
        if self.rounds < FEWEST_ROUNDS:
            return f"fewer than {FEWEST_ROUNDS} rounds"
        iqr, drift = self.q3 - self.q1, abs(self.second - self.first)
        if iqr > MOST_IQR * self.median:
            return f"quartiles {iqr / self.median:.0%} apart"
        if drift > MOST_DRIFT * self.median:
            return f"halves of the rounds {drift / self.median:.0%} apart"
        return None

    def __str__(self) -> str:
        """Half the distance of the quartiles over the median, as in `12.6 ±2%`; nothing for a single round."""
        if self.rounds < 2 or not self.median:
            return ""
        return f"±{(self.q3 - self.q1) / 2 / self.median:.0%}"


def total(spreads: Iterable[Spread]) -> Spread:
    """Of a sum of one or more times."""
    first, *others = spreads
    for spread in others:
        first += spread
    return first


def medians(spreads: Mapping[str, Spread]) -> dict[str, float]:
    """The times alone, by name."""
    return {name: spread.median for name, spread in spreads.items()}


def as_row(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a record: the median of each `Spread`, all else as it is, and the spreads under `spread`."""
    row = {name: value.median if isinstance(value, Spread) else value for name, value in measured.items()}
    return row | {"spread": {name: value for name, value in measured.items() if isinstance(value, Spread)}}


def with_spread(text: str, spread: Spread | None) -> str:
    """A cell: the time, and its spread where it has one."""
    return f"{text} {spread}".rstrip() if spread is not None else text


def print_noise(console: Console, spreads: Mapping[str, Spread], flag: str = "--rounds") -> None:
    """Print the line of `noise`, if there is one; names may hold brackets."""
    if line := noise(spreads, flag):
        console.print(line, markup=False)


def noise(spreads: Mapping[str, Spread], flag: str = "--rounds") -> str | None:
    """One line about the times, by name, that are too noisy to tell anything by; None if there are none.

    `flag` is what says how many rounds there are.
    """
    doubts = {name: spread.doubt for name, spread in spreads.items() if spread.doubt}
    if not doubts:
        return None
    if all(spread.rounds < FEWEST_ROUNDS for spread in spreads.values()):
        return f"{TOO_NOISY}: fewer than {FEWEST_ROUNDS} rounds have no spread; give more {flag}"
    worst = max(doubts, key=lambda name: (spreads[name].q3 - spreads[name].q1) / (spreads[name].median or 1.0))
    return (
        f"{TOO_NOISY}: {len(doubts)} of {len(spreads)} times, the worst {worst}, {doubts[worst]}; "
        "other work ran on this machine: measure again"
    )


GAP = 0.10  # parts further than this from the whole are reported


def sum_of_parts(parts: Spread, whole: Spread) -> dict[str, Any]:
    """Both in microseconds, `gap` = parts / whole - 1, and the verdict: none on times that are too noisy to tell."""
    gap = parts.median / whole.median - 1
    noisy = parts.doubt or whole.doubt
    verdict = TOO_NOISY if noisy else f"over {GAP:.0%}" if abs(gap) > GAP else f"within {GAP:.0%}"
    spread = {"parts_us": parts, "whole_us": whole}
    return {"parts_us": parts.median, "whole_us": whole.median, "gap": gap, "verdict": verdict, "spread": spread}


def sentence(check: dict[str, Any], parts: str, whole: str) -> str:
    """One line; the gap is left out where the times are too noisy."""
    us: tuple[Spread, Spread] = check["spread"]["parts_us"], check["spread"]["whole_us"]
    texts = [with_spread(f"{spread.median:,.1f} us", spread) for spread in us]
    both = f"{parts} {texts[0]}, {whole} {texts[1]}"
    if check["verdict"] == TOO_NOISY:
        return f"{TOO_NOISY}: {both} ({us[0].doubt or us[1].doubt})"
    warning = f"OVER {GAP:.0%}: " if check["verdict"] == f"over {GAP:.0%}" else ""
    return f"{warning}{both}, gap {check['gap']:+.1%}"
