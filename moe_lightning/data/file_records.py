"""What was found out about files, remembered until they change, so that no start reads them again."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from moe_lightning.data.cache import build_once

# A file changed twice within one tick of the file system's clock may have one time for two contents (git calls it
# racily clean): what is younger than this is looked at again next time.
SETTLED_NS = 2_000_000_000
# Raise it when what is found out about a file changes, such as which formats are read.
FORMAT = "moe_lightning files 1"


class FileRecords:
    """Findings by path, each true while the file has the size and times that it had.

    Kept as JSON in ``file``, written whole or not at all; a damaged one counts as empty. A finding is a list that
    JSON can hold.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            saved = json.loads(file.read_bytes())
        except (OSError, ValueError):
            saved = None
        whole = isinstance(saved, dict) and saved.get("format") == FORMAT
        self._found: dict[str, list[Any]] = saved["files"] if whole else {}

    def look_up(self, path: Path, status: os.stat_result) -> list[Any] | None:
        """What ``note`` was given for this state of the file, else None."""
        entry = self._found.get(os.path.abspath(path), [])
        return entry[1:] if entry[:1] == [list(file_stamp(status))] else None

    def note(self, path: Path, status: os.stat_result, finding: Sequence[Any]) -> None:
        """Remember ``finding`` for the state of the file that ``status`` describes, unless it is too young."""
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
            return
        self._found[os.path.abspath(path)] = [list(file_stamp(status)), *finding]
        self._changed = True

    def save(self) -> None:
        """Write what is new; files that are gone are forgotten. A warning, and no error, where there is no space."""
        if not self._changed:
            return
        self._found = {path: entry for path, entry in self._found.items() if os.path.exists(path)}
        content = json.dumps({"format": FORMAT, "files": self._found}).encode()
        try:
            build_once(self._file, lambda _: False, lambda file: file.write(content))
        except ValueError as error:
            rank_zero_warn(f"{error}; the next start reads the text again")
        self._changed = False


def file_stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Size and times; the second time is the kernel's own and changes with every write and rename."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
