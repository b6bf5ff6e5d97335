"""Figures of training runs: loss, time of routing, load of the experts."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lightning.report.charts import Bars, Plot, Series, bar, heat_map, longest_shown, plot
from moe_lightning.report.figures import PHASES, Figure, Section, colours
from moe_lightning.report.read_run import Run
from moe_lightning.report.scales import axis

_ROUTE = ("T_logit", "T_select", "T_index", "T_permute", "T_pack, backward")
_STEP = ("T_route", "T_experts", "T_unpack", "rest of the step")


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Those for which a run logged something."""
    colour = colours(run.label for run in runs)
    found = {
        "Loss": [_loss(runs, colour)],
        "What routing costs": [_time(runs)],
        "How evenly experts are loaded": [_load(runs, colour), _skew(runs, colour), _skew_and_loss(runs, colour)],
    }
    sections = [Section(title, [figure for figure in figures if figure]) for title, figures in found.items()]
    return [section for section in sections if section.figures]


def _loss(runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    charts = [
        chart
        for title, tag, style in (("training", "train/loss", "solid"), ("validation", "val/loss", "solid points"))
        if (chart := _over_steps(runs, colour, title, tag, style=style, log=True))
    ]
    text = "Cross-entropy in nats a token over optimizer steps, on a logarithmic scale."
    return _figure("Loss by router", text, charts, runs, colour)


def _time(runs: Sequence[Run]) -> Figure | None:
    timed = [run for run in runs if run.time_ms("T_route") is not None and run.step_ms()]
    if not timed:
        return None
    charts = []
    for title, names in (("T_route by part, ms a step", _ROUTE), ("the whole step, ms", _STEP)):
        parts = [[(name, PHASES[name], _part(run, name)) for name in names] for run in timed]
        longest = longest_shown([sum(value for _, _, value in row) for row in parts])
        rows = [bar(run.label, row, longest, "ms") for run, row in zip(timed, parts, strict=True)]
        charts.append(Bars(title, rows))
    text = (
        "One step, forward and backward of all layers. T_route = T_logit (gate) + T_select (top-k, softmax) + T_pack, "
        "and T_pack = T_index (sort by expert) + T_permute (gather rows). Backward knows only their sum. "
        "Compare times only of runs on the same machine with nothing else on it."
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
        "Tokens of an expert over the mean of its layer, since the logging step before: a row a layer, a column an "
        "expert, the first at the top left. Move the slider to see the load settle."
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
        series = []
        for run in runs:
            skew, loss = (
                dict(zip(*run.events.curves.get(found, ((), ())), strict=True)) for found in (tag, "val/loss")
            )
            shared = sorted(skew.keys() & loss.keys())
            if shared:
                xs, ys = [skew[step] for step in shared], [loss[step] for step in shared]
                series.append(Series(run.label, colour[run.label], xs, ys, "solid points end"))
        if series:
            x = axis(name, [value for one in series for value in one.xs])
            y = axis("", [value for one in series for value in one.ys], log=True)
            charts.append(plot(f"validation loss over {name}", x, y, series))
    text = (
        "A point a validation, joined in the order of steps; the large one is the last. The skew is that of the same "
        "validation, mean over layers."
    )
    return _figure("Skew against loss", text, charts, runs, colour)


def _over_steps(
    runs: Sequence[Run], colour: dict[str, str], title: str, tag: str, style: str = "solid", log: bool = False
) -> Plot | None:
    """A scalar of every run that logged it."""
    found = [(run, run.events.curves[tag]) for run in runs if tag in run.events.curves]
    if not found:
        return None
    series = [Series(run.label, colour[run.label], curve.steps, curve.values, style) for run, curve in found]
    y = axis("", [value for _, curve in found for value in curve.values], log=log)
    return plot(title, axis("step", [step for _, curve in found for step in curve.steps], snug=True), y, series)


def _figure(title: str, text: str, charts: list[Plot], runs: Sequence[Run], colour: dict[str, str]) -> Figure | None:
    if not charts:
        return None
    shown = {line.name for chart in charts for line in chart.lines}
    legend = [(label, name) for label, name in colour.items() if label in shown]
    return Figure(title, text, list(charts), [run.source for run in runs if run.label in shown], legend)
