"""run.json, summary.json and config.yaml of a run: as they were written, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moe_lightning.report.source import printable

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
