"""The head of the page: what was run, the best of it, and a row a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lightning.report.figures import colours
from moe_lightning.report.read_run import Checkpoint, Run
from moe_lightning.report.scales import DASH, number, short

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Cell:
    """A figure of the table; `best` is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A run in the table."""

    label: str
    colour: str
    cells: list[Cell]
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Key:
    """One figure worth a large print."""

    value: str
    unit: str
    what: str
    label: str
    colour: str


@dataclass(frozen=True)
class _Column:
    head: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    best: Callable[[Sequence[float]], float] = min


def _skew(run: Run) -> tuple[float | None, float | None]:
    """max/mean and CV of the worst layer over the whole run."""
    if run.events.loads:
        counts_LE = np.sum([load.counts_LE for load in run.events.loads], axis=0, dtype=np.int64)
        mean_L = np.maximum(counts_LE.mean(1), 1e-9)
        return float((counts_LE.max(1) / mean_L).max()), float((counts_LE.std(1) / mean_L).max())
    peaks, cvs = run.summary.get("max_over_mean_L"), run.summary.get("cv_L")
    return max(peaks) if peaks else None, max(cvs) if cvs else None


def _share(run: Run) -> float | None:
    route, step = run.time_ms("T_route"), run.step_ms()
    return route / step if route is not None and step else None


_COLUMNS = (
    _Column("validation loss", lambda run: run.last("val/loss"), lambda v: f"{v:.3f}"),
    _Column("perplexity", lambda run: run.last("val/perplexity"), lambda v: f"{v:,.2f}"),
    _Column("T_route, ms", lambda run: run.time_ms("T_route"), number),
    _Column("of the step", _share, lambda v: f"{v:.1%}"),
    _Column("step, ms", lambda run: run.step_ms(), number),
    _Column("load max/mean", lambda run: _skew(run)[0], lambda v: f"{v:.2f}"),
    _Column("load CV", lambda run: _skew(run)[1], lambda v: f"{v:.2f}"),
    _Column(
        "tokens / s",
        lambda run: run.tokens_per_second(),
        lambda v: f"{v:,.0f}",
        max,
    ),
)
HEADS = [column.head for column in _COLUMNS]


def table(runs: Sequence[Run]) -> list[Row]:
    """A row a run, the best of each column marked where there is more than one."""
    colour = colours(run.label for run in runs)
    values = [[column.value(run) for run in runs] for column in _COLUMNS]
    rows = []
    for i, run in enumerate(runs):
        cells = []
        for column, of_runs in zip(_COLUMNS, values, strict=True):
            known = [value for value in of_runs if value is not None]
            value = of_runs[i]
            text = DASH if value is None else column.text(value)
            best = len(known) > 1 and value is not None and text == column.text(column.best(known))
            cells.append(Cell(text, best))
        rows.append(Row(run.label, colour[run.label], cells, run.checkpoint))
    return rows


def keys(runs: Sequence[Run]) -> list[Key]:
    """The best loss, the cheapest routing, the most even load."""
    colour = colours(run.label for run in runs)
    found = []
    for index, what, unit in (
        (0, "lowest validation loss", ""),
        (2, "cheapest routing", "ms a step"),
        (6, "most even load", "CV"),
    ):
        column = _COLUMNS[index]
        known = [(value, run) for run in runs if (value := column.value(run)) is not None]
        if known:
            value, run = min(known, key=lambda pair: pair[0])
            found.append(Key(column.text(value), unit, what, run.label, colour[run.label]))
    return found


def headline(runs: Sequence[Run], records: int) -> tuple[str, str]:
    """Title and the line under it."""
    if not runs:
        return f"{_count(records, 'benchmark record')}", "moe_lightning"
    title = f"{_count(len(runs), 'run')} of {_shared([run.model for run in runs]) or 'several models'}"
    facts = []
    if size := _shared([run.parameters for run in runs]):
        active = _shared([run.active_parameters for run in runs])
        facts.append(
            f"{short(size)} parameters" + (f", {short(active)} active a token" if active and active < size else "")
        )
    names = {"n_layers": "layers", "d_model": "d_model", "num_experts": "experts", "top_k": "top-k"}
    for field, word in names.items():
        value = _shared([run.sizes.get(field) for run in runs])
        if value is not None:
            facts.append(f"{word} {value}" if field in ("d_model", "top_k") else f"{value} {word}")
    if (ranks := _shared([run.ranks for run in runs])) and ranks > 1:
        facts.append(f"{ranks} ranks")
    if steps := _shared([run.steps() for run in runs]):
        facts.append(f"{steps:,} steps")
    return title, " · ".join(facts)


def _count(many: int, noun: str) -> str:
    word = _WORDS[many] if many < len(_WORDS) else str(many)
    return f"{word} {noun}{'' if many == 1 else 's'}".capitalize()


def _shared(values: list[Any]) -> Any:
    """What all have alike, else None."""
    return values[0] if len({repr(value) for value in values}) == 1 else None
