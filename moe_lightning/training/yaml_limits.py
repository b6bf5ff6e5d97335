"""YAML within limits: a few lines of aliases can stand for more values than a machine has memory for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

#: A configuration of all classes and callbacks has under a thousand values, in a dozen levels.
MOST_VALUES = 100_000
MOST_LEVELS = 100

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def bounded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """`load` for YAML text that raises ValueError where it is too deep or, aliases written out, too large."""

    def load_bounded(text: str) -> Any:
        _check_size(text)
        return load(text)

    return load_bounded


def _check_size(text: str) -> None:
    """Goes by the parser's events: what builds a tree is recursive, and libyaml's ends in a segmentation fault."""
    anchors: dict[str, tuple[float, int]] = {}  # name -> values and levels; endless while the anchor is open
    open_nodes: list[tuple[str | None, float, int]] = [(None, 0, 0)]
    for event in yaml.parse(text, Loader=_PARSER):
        if isinstance(event, yaml.CollectionStartEvent):
            if event.anchor:
                anchors[event.anchor] = (float("inf"), 0)
            open_nodes.append((event.anchor, 1, 1))
            _check_levels(len(open_nodes))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            name, values, levels = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            name, (values, levels) = None, anchors.get(event.anchor or "", (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            name, values, levels = event.anchor, 1, 0
        else:
            continue
        if name:
            anchors[name] = values, levels
        around, values_around, levels_around = open_nodes.pop()
        open_nodes.append((around, values_around + values, max(levels_around, levels + 1)))
        _check_levels(levels)
        if values_around + values > MOST_VALUES:
            raise ValueError(
                f"config: YAML must have at most {MOST_VALUES} values, got more, aliases (*name) counted; write less"
            )


def _check_levels(levels: int) -> None:
    if levels > MOST_LEVELS:
        raise ValueError(f"config: YAML must have at most {MOST_LEVELS} levels, got more; nest less deeply")
