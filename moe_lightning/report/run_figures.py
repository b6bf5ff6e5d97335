"""Figures of training runs: loss, time of routing, load of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_lightning.report.charts import Bars, Plot, Series, axis, bar, heat_map, longest_shown, plot
from moe_lightning.report.compare import Comparison
from moe_lightning.report.events import Curve
from moe_lightning.report.figures import PHASES, Figure, Section, colours
from moe_lightning.report.read_run import Run

_ROUTE = ("T_logit", "T_select", "T_index", "T_permute", "T_pack, backward")
_STEP = ("T_route", "T_experts", "T_unpack", "rest of the step")
_SAME_MACHINE = "Compare times only of runs on the same machine with nothing else on it."


def run_sections(runs: Sequence[Run], comparison: Comparison) -> list[Section]:
    """Those for which a run logged something."""
    colour = colours(run.label for run in runs)
    sections = {
        "Loss": [_loss(runs, colour)],
        "What routing costs": [_time(runs, comparison)],
        "How evenly experts are loaded": [_load(runs, colour), _skew(runs, colour), _skew_and_loss(runs, colour)],
    }
    drawn = [Section(title, [figure for figure in figures if figure]) for title, figures in sections.items()]
    return [section for section in drawn if section.figures]


def _loss(runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    tags = ("train/loss", "val/loss")
    charts = [
        chart
        for title, tag, style in (("training", tags[0], "solid"), ("validation", tags[1], "solid points"))
        if (chart := _over_steps(runs, colour, title, tag, tags, style=style, log=True))
    ]
    text = "Cross-entropy in nats per token over optimizer steps, each on a logarithmic scale of its own."
    return _figure("Loss by router", text, charts, runs, colour)


def _time(runs: Sequence[Run], comparison: Comparison) -> Figure | None:
    timed = [run for run in runs if run.time_ms("T_route") is not None and run.step_ms()]
    if not timed:
        return None
    charts = []
    for title, names in (
        ("T_route by part, ms per micro-batch", _ROUTE),
        ("the whole step, ms per micro-batch", _STEP),
    ):
        parts = [[(name, PHASES[name], _part(run, name)) for name in names] for run in timed]
        longest = longest_shown([sum(value for _, _, value in row) for row in parts])
        rows = [bar(run.label, row, longest, "ms") for run, row in zip(timed, parts, strict=True)]
        charts.append(Bars(title, rows))
    text = (
        "One micro-batch, forward and backward of all layers. T_route = T_logit (gate) + T_select (top-k, softmax) + "
        "T_pack, and T_pack = T_index (sort by expert) + T_permute (gather rows). Backward knows only their sum. "
        f"Each of the two charts has a scale of its own. {comparison.not_times or _SAME_MACHINE}"
    )
    legend = [(name, PHASES[name]) for name in (*_ROUTE, *_STEP)]
    return Figure("Time of a step", text, charts, [run.source for run in timed], legend)


def _part(run: Run, name: str) -> float:
    """Milliseconds of a part; what is measured in backward as a sum, and the rest of the step, are differences."""
    if name == "T_pack, backward":
        return max(0.0, _part(run, "T_pack") - _part(run, "T_index") - _part(run, "T_permute"))
    if name == "rest of the step":
        return max(0.0, (run.step_ms() or 0.0) - sum(_part(run, part) for part in _STEP[:-1]))
    return run.time_ms(name) or 0.0


def _load(runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    loaded = [run for run in runs if run.events.loads]
    if not loaded:
        return None
    charts = [heat_map(run.label, colour[run.label], run.events.loads) for run in loaded]
    text = (
        "Tokens of an expert in training over the mean of its layer, since the logging step before: a row per layer, a "
        "column per expert, the first at the top left, on one log2 scale for all runs. Move the slider to see the load "
        "settle; a run that ended before keeps its last step."
    )
    return Figure("Load of every expert", text, charts, [run.source for run in loaded])


def _skew(runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    charts = [
        chart
        for title, tag in (("max / mean", "expert_load/max_over_mean"), ("CV", "expert_load/cv"))
        if (chart := _over_steps(runs, colour, title, tag))
    ]
    text = "Mean over layers. 1 is even for max / mean, 0 for CV (standard deviation over mean)."
    return _figure("Skew while training", text, charts, runs, colour)


def _skew_and_loss(runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    charts = []
    for name, tag in (("CV", "expert_load_val/cv"), ("max / mean", "expert_load_val/max_over_mean")):
        series, ends = [], set()
        for run in runs:
            skew, loss = (dict(zip(*_curve(run, one), strict=True)) for one in (tag, "val/loss"))
            shared = sorted(skew.keys() & loss.keys())
            if shared:
                xs, ys = [skew[step] for step in shared], [loss[step] for step in shared]
                series.append(Series(run.label, colour[run.label], xs, ys, "solid points end", f"at {shared[-1]:,}"))
                ends.add(shared[-1])
        if series:
            if len(ends) == 1:
                series = [replace(one, end_note="") for one in series]
            x = axis(name, [value for one in series for value in one.xs])
            y = axis("", [value for one in series for value in one.ys], log=True)
            charts.append(plot(f"validation loss over {name}", x, y, series))
    text = (
        "A point per validation, joined in the order of steps; the large one is the run's last, with its step where "
        "those of the runs are not the same. The skew is that of the same validation, mean over layers."
    )
    return _figure("Skew against loss", text, charts, runs, colour)


def _over_steps(
    runs: Sequence[Run],
    colour: dict[str, str],
    title: str,
    tag: str,
    tags: Sequence[str] = (),
    style: str = "solid",
    log: bool = False,
) -> Plot | None:
    """A scalar of every run that logged it, over the steps of it and of `tags`, which are drawn on the same scale."""
    logged = [(run, curve) for run in runs if (curve := _curve(run, tag)).steps]
    if not logged:
        return None
    same_end = len({curve.steps[-1] for _, curve in logged}) == 1
    series = [
        Series(run.label, colour[run.label], *curve, style, "" if same_end else f"at {curve.steps[-1]:,}")
        for run, curve in logged
    ]
    y = axis("", [value for _, curve in logged for value in curve.values], log=log)
    steps = [step for run in runs for each in (tag, *tags) for step in _curve(run, each).steps]
    return plot(title, axis("step", steps, tight=True), y, series)


def _curve(run: Run, tag: str) -> Curve:
    """Of a scalar, what can be drawn."""
    return run.events.curves.get(tag, Curve([], [])).finite()


def _figure(title: str, text: str, charts: list[Plot], runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    if not charts:
        return None
    shown = {line.name for chart in charts for line in chart.lines}
    legend = [(label, name) for label, name in colour.items() if label in shown]
    return Figure(title, text, list(charts), [run.source for run in runs if run.label in shown], legend)
