"""The head of the page: what was run, the best of what can be compared, and a row per run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_lightning.report.charts import number, short
from moe_lightning.report.compare import Comparison, moments
from moe_lightning.report.events import Curve
from moe_lightning.report.figures import DASH, colours
from moe_lightning.report.read_run import Checkpoint, Run

EVALUATION, TRAINING = "evaluation", "training"

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Cell:
    """A figure of the table, and a note on it; `best` is the best of those that can be compared."""

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A run in the table."""

    label: str
    colour: str
    cells: list[Cell]
    checkpoint: Checkpoint | None
    checkpoint_note: str
    state: str


@dataclass(frozen=True)
class Highlight:
    """One figure worth a large print."""

    value: str
    unit: str
    what: str
    label: str
    colour: str


@dataclass(frozen=True)
class Table:
    """A row per run; `notes` are sentences under it, `highlights` the best of what can be compared."""

    heads: list[str]
    rows: list[Row]
    notes: list[str]
    highlights: list[Highlight]


@dataclass(frozen=True)
class _Column:
    head: str
    values: list[float | None]
    text: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None
    """None: nothing is better than another."""
    compared: list[bool] = field(default_factory=list)
    """Which of the values can be; the others are not of the same moment or kind."""
    notes: list[str] = field(default_factory=list)
    key: tuple[str, str] | None = None
    """What its best is, and its unit, in large print."""

    def best_value(self) -> float | None:
        """Of two or more that can be compared."""
        if self.best is None:
            return None
        known = [v for v, c in zip(self.values, self.compared, strict=True) if c and v is not None and math.isfinite(v)]
        return self.best(known) if len(known) > 1 else None

    def cell(self, i: int) -> Cell:
        value, best = self.values[i], self.best_value()
        if value is None:
            return Cell(DASH)
        text = self.text(value) if math.isfinite(value) else number(value)
        marked = best is not None and self.compared[i] and text == self.text(best)
        return Cell(text, marked, self.notes[i] if self.notes else "")


@dataclass(frozen=True)
class _Load:
    """Skew at a step, mean over layers."""

    max_over_mean: float
    cv: float
    kind: str


def _load(run: Run, step: int) -> _Load | None:
    """In the evaluation at `step`; of a run that did not log it, in training, from its start up to that step."""
    peak, cv = (_at([run], f"expert_load_val/{name}", [step])[0] for name in ("max_over_mean", "cv"))
    if peak is not None and cv is not None:
        return _Load(peak, cv, EVALUATION)
    if counted := [load.counts_LE for load in run.events.loads if load.step <= step]:
        counts_LE = np.sum(counted, axis=0, dtype=np.int64)
        mean_L = np.maximum(counts_LE.mean(1), 1e-9)
        return _Load(float((counts_LE.max(1) / mean_L).mean()), float((counts_LE.std(1) / mean_L).mean()), TRAINING)
    peaks, cvs = run.summary.get("max_over_mean_L"), run.summary.get("cv_L")
    if peaks and cvs and step == run.steps():
        return _Load(sum(peaks) / len(peaks), sum(cvs) / len(cvs), TRAINING)
    return None


def _share(run: Run) -> float | None:
    route, step = run.time_ms("T_route"), run.step_ms()
    return route / step if route is not None and step else None


def _loads(runs: Sequence[Run], comparison: Comparison) -> tuple[list[_Load | None], list[str]]:
    """Of each run at its step, and the kinds among them, evaluation first."""
    steps = zip(runs, comparison.steps, strict=True)
    loads = [None if step is None else _load(run, step) for run, step in steps]
    return loads, sorted({load.kind for load in loads if load})


def _columns(runs: Sequence[Run], comparison: Comparison) -> list[_Column]:
    """What was validated, at the moment that the runs have in common; if that is not their end, the last loss too."""
    where = f" at {comparison.where}" if comparison.where else ""
    steps, compared = comparison.steps, comparison.compared
    # A figure of another step than the head names, or than the run's last, carries its own.
    notes = [
        f"step {step:,}" if step is not None and not where and step != run.steps() else ""
        for run, step in zip(runs, steps, strict=True)
    ]
    loads, kinds = _loads(runs, comparison)
    kind = kinds[0] if kinds else ""
    same_kind = [load is not None and load.kind == kind and c for load, c in zip(loads, compared, strict=True)]
    load_notes = [
        ", ".join(filter(None, (load.kind if load and len(kinds) > 1 else "", note)))
        for load, note in zip(loads, notes, strict=True)
    ]
    of_load = f"{', ' + kind if len(kinds) == 1 else ''}{where}"
    # The mean over a run, and of a run without a summary the mean of what it logged, are not of the same steps.
    ended = [bool(run.summary) for run in runs]
    times = [not comparison.not_times and one == any(ended) for one in ended]
    logged = ["" if one == any(ended) else "as logged" for one in ended]
    peaks, cvs = ([getattr(load, name, None) for load in loads] for name in ("max_over_mean", "cv"))
    three, two = "{:.3f}".format, "{:,.2f}".format
    columns = [
        _Column("steps", [run.steps() for run in runs], "{:,.0f}".format),
        _Column("tokens", [_tokens(run) for run in runs], short),
    ]
    if where:
        last = [next(reversed(moments(run)), None) for run in runs]
        ends = [f"step {step:,}" if step is not None else "" for step in last]
        columns.append(_Column("last validation loss", _at(runs, "val/loss", last), three, notes=ends))
    losses, perplexities = _at(runs, "val/loss", steps), _at(runs, "val/perplexity", steps)
    routes = [run.time_ms("T_route") for run in runs]
    return [
        *columns,
        _Column(f"validation loss{where}", losses, three, min, compared, notes, ("lowest validation loss", where)),
        _Column(f"perplexity{where}", perplexities, two, min, compared, notes),
        _Column("T_route, ms", routes, number, min, times, logged, ("cheapest routing", "ms per micro-batch")),
        _Column("of the step", [_share(run) for run in runs], "{:.1%}".format, min, times, logged),
        _Column("step, ms", [run.step_ms() for run in runs], number, min, times, logged),
        _Column(f"load max/mean{of_load}", peaks, two, min, same_kind, load_notes),
        _Column(f"load CV{of_load}", cvs, two, min, same_kind, load_notes, (f"most even load in {kind}", f"CV{where}")),
        _Column("tokens/s", [run.tokens_per_second() for run in runs], "{:,.0f}".format, max, times, logged),
    ]


def _at(runs: Sequence[Run], tag: str, steps: Sequence[int | None]) -> list[float | None]:
    """A scalar of each run at a step of its own."""
    curves = [dict(zip(*run.events.curves.get(tag, Curve([], [])), strict=True)) for run in runs]
    return [None if step is None else curve.get(step) for curve, step in zip(curves, steps, strict=True)]


def _tokens(run: Run) -> float | None:
    """Trained on since the start."""
    steps, each = run.steps(), run.step_tokens()
    return steps * each if steps is not None and each else None


def table(runs: Sequence[Run], comparison: Comparison) -> Table:
    """A row per run, the best of each column marked where there is more than one that can be compared."""
    colour = colours(run.label for run in runs)
    columns = _columns(runs, comparison)
    rows = [
        Row(
            run.label,
            colour[run.label],
            [column.cell(i) for column in columns],
            run.checkpoint,
            _checkpoint_note(run),
            _state(run),
        )
        for i, run in enumerate(runs)
    ]
    highlights = []
    for column in columns:
        if column.key and (best := column.best_value()) is not None:
            what, unit = column.key
            run = next(run for i, run in enumerate(runs) if column.compared[i] and column.values[i] == best)
            highlights.append(Highlight(column.text(best), unit.strip(), what, run.label, colour[run.label]))
    return Table([column.head for column in columns], rows, _notes(runs, comparison), highlights)


def _state(run: Run) -> str:
    """Nothing of a run that has ended and says so."""
    if run.summary:
        return ""
    unread = (run.folder / "summary.json").exists()
    why = "summary.json cannot be read" if unread else "no summary.json: still training, or it broke off"
    return f"{why}; figures are of what is logged"


def _checkpoint_note(run: Run) -> str:
    """Its step, and the loss of validation at that step."""
    if run.checkpoint is None:
        return ""
    step = run.checkpoint.step
    if step is None:
        return "of an unknown step"
    [loss] = _at([run], "val/loss", [step])
    return f"step {step:,}, " + ("not validated there" if loss is None else f"validation loss {number(loss, 4)}")


def _notes(runs: Sequence[Run], comparison: Comparison) -> list[str]:
    notes = ["Times are per micro-batch, forward and backward of all layers, means over the run."]
    _, kinds = _loads(runs, comparison)
    if EVALUATION in kinds:
        notes.append("Load in evaluation is that of all tokens validated on, mean over layers.")
    if TRAINING in kinds:
        notes.append("Load in training is that of all tokens since the start, mean over layers.")
    if comparison.where:
        many = "all" if all(comparison.compared) else f"{sum(comparison.compared)} of {len(runs)}"
        notes.append(
            f"The runs are of different lengths: losses and loads are compared at {comparison.where}, the last at "
            f"which {many} of them were validated."
        )
    notes += filter(None, (comparison.not_losses, comparison.not_times))
    if len(runs) > 1:
        notes.append("Bold: the best of what is compared.")
    return notes


def headline(runs: Sequence[Run], records: int) -> tuple[str, str]:
    """Title and the line under it."""
    if not runs:
        return f"{_count(records, 'benchmark record')}", "moe_lightning"
    title = f"{_count(len(runs), 'run')} of {_shared([run.model for run in runs]) or 'several models'}"
    facts = []
    if size := _shared([run.parameters for run in runs]):
        active = _shared([run.active_parameters for run in runs])
        facts.append(
            f"{short(size)} parameters" + (f", {short(active)} active per token" if active and active < size else "")
        )
    names = {"n_layers": "layers", "d_model": "d_model", "num_experts": "experts", "top_k": "top-k"}
    for name, word in names.items():
        value = _shared([run.sizes.get(name) for run in runs])
        if value is not None:
            facts.append(f"{word} {value}" if name in ("d_model", "top_k") else f"{value} {word}")
    if (ranks := _shared([run.ranks for run in runs])) and ranks > 1:
        facts.append(f"{ranks} ranks")
    if steps := _shared([run.steps() for run in runs]):
        facts.append(f"{steps:,} steps")
    return title, " · ".join(facts)


def _count(many: int, noun: str) -> str:
    word = _WORDS[many] if many < len(_WORDS) else str(many)
    return f"{word} {noun}{'' if many == 1 else 's'}".capitalize()


def _shared(values: list[Any]) -> Any:
    """The value that all share, else None."""
    return values[0] if len({repr(value) for value in values}) == 1 else None
