"""Ranges of a trace that overlap what autograd records, so that viewers, which take slices as a tree, show them.

A hook on a gradient runs inside the record of the node that takes this gradient. A range that one hook begins and
another ends starts inside one such record and stops inside another. The node belongs to the phase whose range it
begins in: the range is moved to begin with that record, and to end where the record of its end begins.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

_NODE = "autograd::engine::evaluate_function"


def nest(events: list[dict[str, Any]], prefix: str) -> None:
    """Move, in place, the ranges whose name begins with `prefix` to the bounds of the autograd nodes they cut.

    Args:
        events: "traceEvents" of a Chrome trace; those with ph "X" have ts and dur in microseconds.
        prefix: of the names of ranges.
    """
    nodes: dict[Any, list[tuple[float, float]]] = {}
    ranges = []
    for event in events:
        if event.get("ph") != "X":
            continue
        name = event["name"]
        if name.startswith(_NODE):
            nodes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        elif name.startswith(prefix) and event["cat"] == "user_annotation":
            ranges.append(event)
    for found in nodes.values():
        found.sort()
    for event in ranges:
        own = nodes.get(event["tid"], [])
        begin, end = event["ts"], event["ts"] + event["dur"]
        first, last = _around(own, begin), _around(own, end)
        if first == last:
            continue  # within one node, or outside all
        begin = begin if first is None else first[0]
        end = end if last is None else last[0]
        event["ts"], event["dur"] = begin, round(end - begin, 3)


def _around(nodes: list[tuple[float, float]], moment: float) -> tuple[float, float] | None:
    """The node that is being evaluated at a moment."""
    i = bisect_right(nodes, (moment, float("inf"))) - 1
    return nodes[i] if i >= 0 and nodes[i][0] < moment < nodes[i][1] else None
