"""Benchmark records: the results with all that is needed to repeat or to doubt them."""

import json
from pathlib import Path
from typing import Any

from moe_lightning.files import write_whole
from moe_lightning.provenance import provenance


def write_record(path: Path | str, name: str, results: Any) -> None:
    """Write a JSON record: machine, versions, commit, command, date and ``results``.

    The file appears whole or not at all; missing folders are made.
    """
    record = {"name": name, **provenance(), "results": results}
    write_whole(Path(path), json.dumps(record, indent=2) + "\n")
