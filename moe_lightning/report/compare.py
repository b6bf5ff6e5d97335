"""Where runs can be compared: at the same step or number of tokens, in which figures, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lightning.report.read_run import Run

#: Settings that change neither what is learnt nor what a step costs.
_NO_MATTER = ("data.cache_dir", "data.num_workers", "data.prompt", "max_new_tokens", "temperature", "compile")
#: Of the trainer's settings, those that do.
_TRAINER = ("precision", "strategy", "accumulate_grad_batches", "gradient_clip_val")
#: Of the data's settings, those under which the same text is validated on.
_NOT_VALIDATED_ON = ("data.batch_size", "data.seed", *_NO_MATTER)


@dataclass(frozen=True)
class Comparison:
    """What may be compared between runs, and what not."""

    where: str
    """The moment of training at which they are, "step 20" or "40,960 tokens"; empty where it is the end of every run,
    or where there is none."""
    steps: list[int | None]
    """Of each run the step there, None if it was not validated there; without such a moment its own last."""
    compared: list[bool]
    """Of each run whether its losses and loads at that step can be compared with others."""
    not_losses: str
    """Why no losses and loads are, a sentence; empty where some are."""
    not_times: str
    """Why times are not."""
    differences: str
    """What the runs differ in."""


def compare(runs: Sequence[Run]) -> Comparison:
    """At the moment that the most runs were validated at, of several the last."""
    own = [moments(run) for run in runs]
    data = [name for name in _names(runs) if name.startswith("data.") and name not in _NOT_VALIDATED_ON]
    texts = _differing(runs, {name: _setting(name) for name in data})
    work = _differing(
        runs,
        {
            "machine": lambda run: run.source.machine,
            "ranks": lambda run: run.ranks,
            "tokens per micro-batch": lambda run: run.batch_tokens(),
        },
    )
    where, at = ("", {}) if texts else _common(runs, own)
    not_losses = ""
    if texts:
        not_losses = f"The runs were not validated on the same text, so no loss or load is compared: {texts}."
    elif not at and len(runs) > 1:
        not_losses = "No two runs were validated at the same point of training, so no loss or load is compared."
    shown = {"steps": lambda run: run.steps(), "model": lambda run: run.model, "ranks": lambda run: run.ranks}
    shown |= {name: _setting(name) for name in _names(runs) if _matters(name)}
    ends = [steps[-1] if steps else None for steps in own]
    steps = [at.get(i) for i in range(len(runs))] if at else ends
    return Comparison(
        where="" if steps == ends else where,
        steps=steps,
        compared=[i in at for i in range(len(runs))],
        not_losses=not_losses,
        not_times=f"Times and tokens/s are not compared: the runs differ in {work}." if work else "",
        differences=_differing(runs, shown, most=8),
    )


def moments(run: Run) -> list[int]:
    """Steps at which it was validated; of a run that never was, its end."""
    curve, end = run.events.curves.get("val/loss"), run.steps()
    return curve.steps if curve else [end] if end is not None else []


def _common(runs: Sequence[Run], own: Sequence[Sequence[int]]) -> tuple[str, dict[int, int]]:
    """The moment, and the step of each run there by its place in `runs`; nothing where no two have one in common.

    By tokens where a step of one run holds more of them than a step of another, else by steps.
    """
    tokens = [run.step_tokens() for run in runs]
    by_tokens = None not in tokens and len(set(tokens)) > 1
    scale = [(each or 1) if by_tokens else 1 for each in tokens]
    places = [{step * one: step for step in steps} for steps, one in zip(own, scale, strict=True)]
    count = Counter(place for of_run in places for place in of_run)
    shared = [place for place in count if count[place] > 1]
    if not shared:
        return "", {}
    place = max(shared, key=lambda each: (count[each], each))
    text = f"{place:,} tokens" if by_tokens else f"step {place:,}"
    return text, {i: of_run[place] for i, of_run in enumerate(places) if place in of_run}


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.settings))


def _matters(name: str) -> bool:
    part, _, rest = name.rpartition(".")
    return name not in _NO_MATTER and (part != "trainer" or rest in _TRAINER)


def _setting(name: str) -> Callable[[Run], Any]:
    """None where the run's configuration does not have it, "none" where it says null."""
    return lambda run: "none" if name in run.settings and run.settings[name] is None else run.settings.get(name)


def _differing(runs: Sequence[Run], fields: Mapping[str, Callable[[Run], Any]], most: int = 0) -> str:
    """steps (20, 400), d_model (32, 64): fields of which two values are known."""
    differing = []
    for name, value in fields.items():
        known = dict.fromkeys(text for run in runs if (text := _text(value(run))))
        if len(known) > 1:
            differing.append(f"{name} ({', '.join(known)})")
    more = [f"{len(differing) - most} more"] if most and len(differing) > most else []
    return ", ".join([*(differing[:most] if most else differing), *more])


def _text(value: Any) -> str:
    """Nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:60]
