"""A run as the report needs it: its folder's event files, config.yaml, run.json, summary.json and checkpoints."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE
from moe_lightning.report.events import Events, event_folders, read_events
from moe_lightning.report.figures import Source, printable, source
from moe_lightning.routers import ROUTERS
from moe_lightning.training.config import MODELS


@dataclass(frozen=True)
class Checkpoint:
    """A file, and the ONNX model exported from it if there is one."""

    name: str
    megabytes: float
    step: int | None = None
    """Optimizer steps taken when it was written; None where neither its name nor its content gives it."""
    onnx: str | None = None
    """Name of the folder."""
    onnx_megabytes: float = 0.0


@dataclass(frozen=True)
class Run:
    """What one run was and what it came to; a figure that was not logged is None."""

    folder: Path
    label: str
    router: str
    model: str
    sizes: dict[str, Any]
    """Arguments of the model."""
    settings: dict[str, Any]
    """Of the model, its router and optimizer, the data and the trainer, that are plain values, by dotted name."""
    parameters: int | None
    active_parameters: int | None
    ranks: int
    events: Events
    summary: dict[str, Any]
    source: Source
    checkpoint: Checkpoint | None
    problems: list[str] = field(default_factory=list)
    """What of its files could not be read, a line each."""

    def last(self, tag: str) -> float | None:
        """Newest value of a scalar, NaN if it came to that."""
        curve = self.events.curves.get(tag)
        return curve.values[-1] if curve else None

    def time_ms(self, name: str) -> float | None:
        """Of a phase, milliseconds per micro-batch: the run's mean, or while it has not ended of what is logged."""
        times = self.summary.get("times_ms")
        if times:
            return times.get(name)
        directions = [self.mean(f"router_time/{direction}/{name}_ms") for direction in ("forward", "backward")]
        known = [value for value in directions if value is not None]
        return sum(known) if known else self.mean(f"router_time/{name}_ms")  # the tag of runs before these

    def step_ms(self) -> float | None:
        """Of a whole step of one micro-batch, as `time_ms`."""
        return self.summary.get("step_ms") or self.mean("router_time/step_ms")

    def tokens_per_second(self) -> float | None:
        """Of all ranks; the summary's is of one."""
        of_one = self.summary.get("tokens_per_second")
        return of_one * self.ranks if of_one else self.mean("throughput/tokens_per_s")

    def mean(self, tag: str) -> float | None:
        """Of a scalar over the run."""
        curve = self.events.curves.get(tag)
        values = curve.finite().values if curve else []
        return sum(values) / len(values) if values else None

    def steps(self) -> int | None:
        """Optimizer steps taken."""
        ended = self.summary.get("steps")
        logged = self.events.curves.get("train/loss")
        return ended if ended is not None else logged.steps[-1] if logged else None

    def batch_tokens(self) -> int | None:
        """Tokens of a micro-batch on all ranks."""
        batch, length = self.settings.get("data.batch_size"), self.settings.get("data.seq_len")
        return batch * length * self.ranks if isinstance(batch, int) and isinstance(length, int) else None

    def step_tokens(self) -> int | None:
        """Tokens of an optimizer step."""
        accumulated = self.settings.get("trainer.accumulate_grad_batches", 1)
        tokens = self.batch_tokens()
        return tokens * accumulated if tokens and isinstance(accumulated, int) else None


def run_folders(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The folder of every run at or under `paths`, once, and a line for each of them that holds none.

    ValueError for a path that is not there: a slip of the command.
    """
    found: dict[Path, Path] = {}
    problems = []
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"report: a run must be a folder with event files, got {printable(path)}, which is not there"
            )
        try:
            found |= {folder.resolve(): folder for folder in event_folders(path)}
        except ValueError as error:
            problems.append(str(error))
    return list(found.values()), problems


def disambiguate(runs: Sequence[Run]) -> list[Run]:
    """With distinct labels: where two have the same router, as much of their paths is added as is needed."""
    named = list(runs)
    for label in {run.label for run in runs}:
        same = [i for i, run in enumerate(runs) if run.label == label]
        paths = {i: runs[i].folder.resolve().parts for i in same}
        length = 2
        while len({parts[-length:] for parts in paths.values()}) < len(set(paths.values())):
            length += 1
        for i in same if len(same) > 1 else ():
            name = _short(runs[i].folder, length)
            named[i] = replace(runs[i], label=f"{label} {name}", source=replace(runs[i].source, name=name))
    return named


def read_run(folder: Path) -> Run:
    """The run whose event files lie in `folder`; only these must be there. ValueError where they cannot be read."""
    events, files = read_events(folder), RunFiles(folder)
    model = files.config.get("model") or {}
    sizes = _fields(model.get("init_args"))
    router, kind = _class_of(sizes.pop("router", None)), _class_of(model)
    named = files.summary.get("router") or {kind.__name__: name for name, kind in ROUTERS.items()}.get(router, router)
    problems = list(files.problems)
    if files.summary and not events.whole:
        problems.append(
            f"report: event files of a run that has ended must be whole, got {printable(folder)}, where one ends "
            "within a record; what follows is missing"
        )
    return Run(
        folder=folder,
        label=named or printable(folder.name),
        router=named or "no router",
        model={kind.__name__: name for name, kind in MODELS.items()}.get(kind, kind),
        sizes=sizes,
        settings=_settings(files.config),
        parameters=files.run.get("parameters"),
        active_parameters=files.run.get("active_parameters"),
        ranks=files.run.get("ranks") or 1,
        events=events,
        summary=files.summary,
        source=source(_short(folder), files.run),
        checkpoint=_best_checkpoint(folder, files.summary),
        problems=problems,
    )


def _fields(config: Any) -> dict[str, Any]:
    """A copy of a part of a configuration; empty for what is none."""
    return dict(config) if isinstance(config, dict) else {}


def _class_of(config: Any) -> str:
    """The class's name in a configuration of class_path and init_args."""
    return str(_fields(config).get("class_path", "")).rpartition(".")[2]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    model = _fields(_fields(config.get("model")).get("init_args"))
    parts = {
        "": model,
        "optimizer.": model.get("optimizer"),
        "router.": _fields(model.get("router")).get("init_args"),
        "data.": config.get("data"),
        "trainer.": config.get("trainer"),
    }
    return {
        f"{prefix}{name}": value
        for prefix, part in parts.items()
        for name, value in _fields(part).items()
        if value is None or isinstance(value, str | int | float)
    }


def _best_checkpoint(folder: Path, summary: dict[str, Any]) -> Checkpoint | None:
    """The one the summary names, which may have moved with its run; of an unfinished run the newest by name."""
    files = {path.name: path for path in sorted((folder / "checkpoints").glob("*.ckpt"))}
    named = Path(summary.get("checkpoint") or "").name
    kept = [name for name in files if not name.startswith("last")] or list(files)
    name = named if named in files else max(kept, key=lambda name: (_step_in(name) or 0, name), default=None)
    if name is None:
        return None
    path = files[name]
    pair = path.with_suffix(".onnx")
    parts = [pair / MODEL_FILE, pair / PARAMS_FILE]
    whole = all(part.is_file() for part in parts)
    return Checkpoint(
        printable(name),
        path.stat().st_size / 1e6,
        _step_of(path),
        printable(pair.name) if whole else None,
        sum(part.stat().st_size for part in parts) / 1e6 if whole else 0.0,
    )


def _step_in(name: str) -> int | None:
    found = re.search(r"(?:^|\W)step=(\d+)", name)
    return int(found[1]) if found else None


def _step_of(path: Path) -> int | None:
    """What the file's name says, or the file; its weights stay on the disk."""
    step = _step_in(path.name)
    if step is None:
        try:
            step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            return None
    return step if isinstance(step, int) else None


def _short(folder: Path, parts: int = 2) -> str:
    """The path a run goes by: its last parts."""
    return printable("/".join(folder.resolve().parts[-parts:]))


Fields = Mapping[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int | float) for each in value)


def _named_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


#: What is read of each file, and what it must be where it is not None. The first field has to be there.
SUMMARY: Fields = {
    "steps": _whole,
    "router": _text,
    "tokens_per_second": _number,
    "step_ms": _number,
    "times_ms": _named_numbers,
    "max_over_mean_L": _numbers,
    "cv_L": _numbers,
    "checkpoint": _text,
}
RUN: Fields = {
    "command": _text,
    "date": _text,
    "commit": _mapping,
    "machine": _mapping,
    "parameters": _whole,
    "active_parameters": _whole,
    "ranks": _whole,
}
CONFIG: Fields = {"model": _mapping, "data": _mapping, "trainer": _mapping}


class RunFiles:
    """The files of one folder; `problems` are those that could not be read, a line each.

    A file that is missing holds nothing, as of a run that is still going on.
    """

    def __init__(self, folder: Path) -> None:
        self.problems: list[str] = []
        self.summary = self._read(folder / "summary.json", json.loads, SUMMARY)
        self.run = self._read(folder / "run.json", json.loads, RUN)
        self.config = self._read(folder / "config.yaml", yaml.safe_load, CONFIG)

    def _read(self, path: Path, parse: Callable[[str], Any], fields: Fields) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            return _checked(parse(path.read_text(encoding="utf-8")), fields)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:150]
            self.problems.append(
                f"report: {printable(path)} must hold what a run writes, got another ({reason}); the run is shown "
                "without"
            )
            return {}


def _checked(found: Any, fields: Fields) -> dict[str, Any]:
    """What was read, if it is ours."""
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} in place of named fields")
    first = next(iter(fields))
    if found.get(first) is None:
        raise ValueError(f"no {first!r} in it")
    for name, fits in fields.items():
        value = found.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{name}={str(value)[:40]!r}")
    return found
