"""Benchmark records: the results with all that is needed to repeat or to doubt them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_lightning.bench.spread import Spread
from moe_lightning.utils.files import atomic_write
from moe_lightning.utils.provenance import commit, provenance

PUBLISHED = ("docs", "benchmarks")


def write_record(path: Path | str, name: str, results: Any) -> None:
    """Write a JSON record: machine, versions, commit, command, date and ``results``.

    The file appears whole or not at all; missing folders are made. ValueError as for `check_record_path`.
    """
    check_record_path(f"bench.{name}", path)
    record = {"name": name, **provenance(), "results": results}
    atomic_write(Path(path), json.dumps(record, indent=2, default=_plain) + "\n")


def check_record_path(component: str, path: Path | str) -> None:
    """Raise ValueError for a file in docs/benchmarks unless the code that runs is known to be that of a commit.

    Published figures come from there. Elsewhere a record may be of changed code; it says so (`commit.dirty`).
    """
    folders = Path(path).resolve().parent.parts
    if PUBLISHED not in pairwise(folders):
        return
    head = commit()
    if head["dirty"] is False:
        return
    if head["id"] is None:
        got, remedy = "no commit", "run in a git checkout, or set GIT_COMMIT=ID GIT_DIRTY=0 for a copy of one"
    elif head["dirty"] is None:
        got, remedy = f"GIT_COMMIT={head['id']} alone", "set GIT_DIRTY=0 too if the copy has no changes"
    else:
        got, remedy = f"{head['id'][:7]} with changes", "commit them"
    raise ValueError(
        f"{component}: a record in docs/benchmarks must be of a commit without changes, got {got}; {remedy}, or write "
        "the record elsewhere"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value.as_record()
    raise TypeError(f"bench.record: results must be plain types, got {type(value).__name__}")
