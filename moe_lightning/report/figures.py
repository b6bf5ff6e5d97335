"""What the page is made of, and the colours that mean the same all over it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.report.source import Origin, Source, origins
from moe_lightning.routers import ROUTERS

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
    def origins(self) -> list[Origin]:
        """The sources as they are named under the charts."""
        return origins(self.sources)


@dataclass(frozen=True)
class Section:
    """Figures under a heading."""

    title: str
    figures: list[Figure]


def colours(names: Iterable[str]) -> dict[str, str]:
    """A class for every name: the first that begins with a router has the router's, others what is free, in order."""
    given = list(dict.fromkeys(names))
    fixed = {router: f"c{i}" for i, router in enumerate(ROUTERS)}
    found: dict[str, str] = {}
    for name in given:
        router = re.split("[ ,]", name)[0]
        if router in fixed:
            found[name] = fixed.pop(router)
    free = [f"c{i}" for i in range(COLOURS) if f"c{i}" not in found.values()] or ["c0"]
    others = [name for name in given if name not in found]
    return {name: found.get(name) or free[others.index(name) % len(free)] for name in given}
