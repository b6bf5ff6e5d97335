"""A run as the report needs it: its folder's event files, config.yaml, run.json, summary.json and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE
from moe_lightning.report.events import Events, event_folders, read_events
from moe_lightning.report.source import Source, source
from moe_lightning.routers import ROUTERS
from moe_lightning.training.names import MODELS


@dataclass(frozen=True)
class Checkpoint:
    """A file, and the exported pair beside it if there is one."""

    name: str
    megabytes: float
    onnx: str | None = None
    """Name of the folder."""
    onnx_megabytes: float = 0.0


@dataclass(frozen=True)
class Run:
    """What one run was and what it came to; a figure that was not logged is None."""

    label: str
    router: str
    model: str
    sizes: dict[str, Any]
    """Arguments of the model."""
    parameters: int | None
    active_parameters: int | None
    ranks: int
    events: Events
    summary: dict[str, Any]
    source: Source
    checkpoint: Checkpoint | None

    def last(self, tag: str) -> float | None:
        """Newest value of a scalar."""
        curve = self.events.curves.get(tag)
        return curve.values[-1] if curve else None

    def time_ms(self, name: str) -> float | None:
        """Of a phase, milliseconds a step: the run's mean, or while it has not ended the mean of what is logged."""
        times = self.summary.get("times_ms")
        return times[name] if times else self.mean(f"router_time/{name}_ms")

    def step_ms(self) -> float | None:
        """Of a whole step, as `time_ms`."""
        return self.summary.get("step_ms") or self.mean("router_time/step_ms")

    def tokens_per_second(self) -> float | None:
        """Of all ranks; the summary's is of one."""
        of_one = self.summary.get("tokens_per_second")
        return of_one * self.ranks if of_one else self.mean("throughput/tokens_per_s")

    def mean(self, tag: str) -> float | None:
        """Of a scalar over the run."""
        curve = self.events.curves.get(tag)
        return sum(curve.values) / len(curve.values) if curve else None

    def steps(self) -> int | None:
        """Optimizer steps taken."""
        logged = self.events.curves.get("train/loss")
        return self.summary.get("steps") or (logged.steps[-1] + 1 if logged else None)


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The folder of every run at or under `paths`, once."""
    return list({folder.resolve(): folder for path in paths for folder in event_folders(path)}.values())


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """With labels that are unlike: where two have the same router, their paths are added."""
    labels = [run.label for run in runs]
    return [
        replace(run, label=f"{run.label} {run.source.name}") if labels.count(run.label) > 1 else run for run in runs
    ]


def read_run(folder: Path) -> Run:
    """The run whose event files lie in `folder`; only these must be there."""
    card, summary = _json(folder / "run.json"), _json(folder / "summary.json")
    model = _config(folder).get("model") or {}
    sizes = dict(model.get("init_args") or {})
    router = sizes.pop("router", None) or {}
    router_class = str(router.get("class_path", "")).rpartition(".")[2]
    model_class = str(model.get("class_path", "")).rpartition(".")[2]
    named = summary.get("router") or {kind.__name__: name for name, kind in ROUTERS.items()}.get(
        router_class, router_class
    )
    return Run(
        label=named or folder.name,
        router=named or "no router",
        model={kind.__name__: name for name, kind in MODELS.items()}.get(model_class, model_class),
        sizes=sizes,
        parameters=card.get("parameters"),
        active_parameters=card.get("active_parameters"),
        ranks=card.get("ranks", 1),
        events=read_events(folder),
        summary=summary,
        source=source(_short(folder), card),
        checkpoint=_best_checkpoint(folder, summary),
    )


def _best_checkpoint(folder: Path, summary: dict[str, Any]) -> Checkpoint | None:
    """The one the summary names, which may have moved with its run; of an unfinished run the newest by name."""
    files = {path.name: path for path in sorted((folder / "checkpoints").glob("*.ckpt"))}
    named = Path(summary.get("checkpoint") or "").name
    kept = [name for name in files if not name.startswith("last")] or list(files)
    name = named if named in files else kept[-1] if kept else None
    if name is None:
        return None
    path = files[name]
    pair = path.with_suffix(".onnx")
    parts = [pair / MODEL_FILE, pair / PARAMS_FILE]
    whole = all(part.is_file() for part in parts)
    onnx_bytes = sum(part.stat().st_size for part in parts) if whole else 0
    return Checkpoint(name, path.stat().st_size / 1e6, pair.name if whole else None, onnx_bytes / 1e6)


def _short(folder: Path) -> str:
    """The path a run goes by: its last two parts."""
    return "/".join(folder.resolve().parts[-2:])


def _config(folder: Path) -> dict[str, Any]:
    return _mapping(folder / "config.yaml", yaml.safe_load)


def _json(path: Path) -> dict[str, Any]:
    return _mapping(path, json.loads)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"report: {path} must be readable, got {' '.join(str(error).split())[:150]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"report: {path} must hold named fields, got {type(found).__name__}")
    return found
