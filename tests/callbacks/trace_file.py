"""What is in a written trace: its slices, and whether they form a tree."""

import gzip
import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The slices, by time."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    slices = [event for event in events if event.get("ph") == "X" and event["cat"] != "Trace"]
    return sorted(slices, key=lambda event: (event["ts"], -event["dur"]))


def end(event: dict) -> float:
    return event["ts"] + event["dur"]


def overlaps(slices: list[dict]) -> list[tuple[str, str]]:
    """Pairs on one thread of which neither holds the other; times are rounded to nanoseconds."""
    found = []
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        open_slices: list[dict] = []
        for event in slices:
            if (event["pid"], event["tid"]) != thread:
                continue
            while open_slices and end(open_slices[-1]) <= event["ts"] + 2e-3:
                open_slices.pop()
            if open_slices and end(open_slices[-1]) < end(event) - 2e-3:
                found.append((open_slices[-1]["name"], event["name"]))
            open_slices.append(event)
    return found
