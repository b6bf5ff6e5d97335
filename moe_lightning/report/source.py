"""Where a figure of the report comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.report.scales import TIMES


@dataclass(frozen=True)
class Source:
    """A run or a record, in words; an empty string is not known."""

    name: str
    machine: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class Origin:
    """Sources of the same machine, commit and day."""

    names: list[str]
    where: str
    commands: list[str]


def origins(sources: Sequence[Source]) -> list[Origin]:
    """Sources brought together, in their order."""
    groups: dict[tuple[str, str, str], list[Source]] = {}
    for one in sources:
        groups.setdefault((one.machine, one.commit, one.date), []).append(one)
    return [
        Origin(
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
