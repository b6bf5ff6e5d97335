"""What the page is made of, the colours that mean the same all over it, and where a figure comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.routers import ROUTERS

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
#: Colour classes of the style sheet for routers and whatever else is compared.
COLOURS = 8
#: Colour class of each phase.
PHASES = {
    "T_logit": "logit",
    "T_select": "select",
    "T_index": "index",
    "T_permute": "permute",
    "T_pack": "pack",
    "T_pack, backward": "pack",
    "T_route": "route",
    "T_experts": "experts",
    "T_unpack": "unpack",
    "rest of the step": "rest",
}


@dataclass(frozen=True)
class Figure:
    """Charts under one title, with what they say, a legend of (name, colour class), and their sources."""

    title: str
    text: str
    charts: list[Any]
    sources: list[Source]
    legend: list[tuple[str, str]] = field(default_factory=list)

    @property
    def provenances(self) -> list[Provenance]:
        """The sources as they are named below the charts."""
        return provenances(self.sources)


@dataclass(frozen=True)
class Section:
    """Figures under a heading."""

    title: str
    figures: list[Figure]


def colours(names: Iterable[str]) -> dict[str, str]:
    """A class for every name: the first that begins with a router has the router's, others what is free, in order."""
    given = list(dict.fromkeys(names))
    fixed = {router: f"c{i}" for i, router in enumerate(ROUTERS)}
    chosen: dict[str, str] = {}
    for name in given:
        router = re.split("[ ,]", name)[0]
        if router in fixed:
            chosen[name] = fixed.pop(router)
    free = [f"c{i}" for i in range(COLOURS) if f"c{i}" not in chosen.values()] or ["c0"]
    others = [name for name in given if name not in chosen]
    return {name: chosen.get(name) or free[others.index(name) % len(free)] for name in given}


@dataclass(frozen=True)
class Source:
    """A run or a record, in words; an empty string is not known."""

    name: str
    machine: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class Provenance:
    """Sources of the same machine, commit and day."""

    names: list[str]
    where: str
    commands: list[str]


def provenances(sources: Sequence[Source]) -> list[Provenance]:
    """Sources brought together, in their order."""
    groups: dict[tuple[str, str, str], list[Source]] = {}
    for one in sources:
        groups.setdefault((one.machine, one.commit, one.date), []).append(one)
    return [
        Provenance(
            [one.name for one in group],
            " · ".join(
                (machine or "machine not recorded", f"commit {commit or 'not recorded'}", *filter(None, [date]))
            ),
            [one.command for one in group if one.command],
        )
        for (machine, commit, date), group in groups.items()
    ]


def printable(path: Path | str) -> str:
    """A path as text that any file and terminal can hold: a byte of it that is no UTF-8 is spelled \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def source(name: str, card: dict[str, Any]) -> Source:
    """From what `provenance()` wrote: a record's head, or a run's run.json."""
    machine, commit = card.get("machine") or {}, card.get("commit") or {}
    gpus = [str(gpu) for gpu in machine.get("gpus") or ()]
    if gpus:
        words = " + ".join(f"{gpus.count(gpu)} {TIMES} {gpu}" for gpu in dict.fromkeys(gpus))
    else:
        words = f"{machine['cpu']}, {machine.get('cores')} cores" if "cpu" in machine else ""
    identity = str(commit.get("id") or "")[:7] + (" + changes" if commit.get("dirty") else "")
    return Source(name, words, identity, str(card.get("command", "")), str(card.get("date", ""))[:10])
