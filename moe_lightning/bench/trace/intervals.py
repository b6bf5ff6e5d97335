"""Sets of intervals of time, as sorted lists of (begin, end) that neither touch nor overlap."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The set that any intervals cover; empty ones are left out."""
    merged: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What both sets cover."""
    both = []
    i = j = 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            both.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(intervals: list[Interval]) -> float:
    """Of all intervals of a set together."""
    return sum(end - begin for begin, end in intervals)
