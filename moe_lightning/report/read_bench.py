"""A benchmark record that the report can draw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.report.source import Source, printable, source

#: What is read of each kind of record; a record of ours has these.
DRAWN: dict[str, tuple[str, ...]] = {
    "router": ("settings", "cases"),
    "layer": ("settings", "cases"),
    "ep": ("settings", "link", "cases"),
    "link": ("kind", "rows"),
    "scale": ("settings", "best"),
    "kernels": ("settings", "rows"),
}


@dataclass(frozen=True)
class Record:
    """Results of one benchmark."""

    name: str
    results: dict[str, Any]
    source: Source


def read_record(path: Path) -> Record:
    """ValueError for what cannot be read, is no record, or is one of a kind that is not drawn."""
    name = printable(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON in it"
        raise ValueError(f"report: --bench must be a readable JSON record, got {name} ({reason})") from error
    if not isinstance(found, dict) or not {"name", "results", "machine", "command"} <= found.keys():
        raise ValueError(f"report: --bench must be a record of moe_lightning.bench, got {name}, which is another file")
    kind = found["name"]
    if kind not in DRAWN:
        raise ValueError(f"report: --bench must be a record of bench {', '.join(DRAWN)}, got {name} of {kind!r}")
    missing = [field for field in DRAWN[kind] if field not in found["results"]]
    if missing:
        raise ValueError(f"report: a record of bench {kind} must hold {', '.join(missing)}, got {name} without")
    return Record(kind, found["results"], source(printable(path.name), found))
