"""TensorBoard's event files of one run.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util import tensor_util

from moe_lightning.callbacks.expert_load import COUNTS_TAG
from moe_lightning.report.figures import printable

_FILES = "events.out.tfevents.*"
#: The first optimizer step is logged as 0; here it is step 1, as in the names of checkpoints.
_FIRST_STEP = 1


class Curve(NamedTuple):
    """A scalar over optimizer steps taken."""

    steps: list[int]
    values: list[float]

    def finite(self) -> Curve:
        """Without NaN and infinities: what can be drawn."""
        kept = [(step, value) for step, value in zip(*self, strict=True) if math.isfinite(value)]
        return Curve([step for step, _ in kept], [value for _, value in kept])


class Load(NamedTuple):
    """Tokens per expert, int (L, E), from one logging step to the next, `step`."""

    step: int
    counts_LE: np.ndarray[Any, Any]


class Events(NamedTuple):
    """What a run logged, by tag."""

    curves: dict[str, Curve]
    loads: list[Load]
    whole: bool = True
    """Whether no file ends within a record, as one does that is being written."""


def event_folders(path: Path) -> list[Path]:
    """Folders at or under `path` that hold event files; ValueError if there is no such folder or none in it."""
    if not path.is_dir():
        raise ValueError(
            f"report: a run must be a folder with event files, got {printable(path)}, which is no folder; name another"
        )
    folders = sorted({file.parent for file in path.rglob(_FILES)})
    if not folders:
        raise ValueError(
            f"report: a run must hold {_FILES} files, got {printable(path)} without; train one first, with "
            "TensorBoardLogger"
        )
    return folders


def read_events(folder: Path) -> Events:
    """All scalars and the load counts of `ExpertLoadMonitor`; of a step logged twice, the later value.

    A record that is not all there yet ends its file. ValueError for a damaged file and where there is no scalar.
    """
    scalars: dict[str, dict[int, float]] = {}
    counts: dict[int, np.ndarray[Any, Any]] = {}
    whole = True
    for path in sorted(folder.glob(_FILES)):
        for event in _events(path):
            if event is None:
                whole = False
                continue
            step = event.step + _FIRST_STEP
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, {})[step] = value.simple_value
                elif value.tag == COUNTS_TAG and value.HasField("tensor"):
                    counts[step] = tensor_util.make_ndarray(value.tensor)
    if not scalars:
        raise ValueError(f"report: event files must hold scalars, got {printable(folder)} without; train a step first")
    if len({count.shape for count in counts.values()}) > 1 or any(count.ndim != 2 for count in counts.values()):
        raise ValueError(
            f"report: {COUNTS_TAG} must be counts of layers x experts, the same all through a run, got other shapes in "
            f"{printable(folder)}; keep each run in a folder of its own"
        )
    curves = {tag: Curve(sorted(points), [points[step] for step in sorted(points)]) for tag, points in scalars.items()}
    return Events(curves, [Load(step, counts[step]) for step in sorted(counts)], whole)


def _events(path: Path) -> Iterator[Event | None]:
    """Of one file, and None where it ends within a record.

    TensorBoard's own reader ends at a damaged record as it does at the last one, and opens no path that is not UTF-8.
    """
    try:
        for record in _records(path):
            yield None if record is None else Event.FromString(record)
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a record is no event"
        raise ValueError(
            f"report: an event file must be readable and undamaged, got {printable(path)} ({reason}); the run is left "
            "out, move the file away to see what else it has"
        ) from error


def _records(path: Path) -> Iterator[bytes | None]:
    """TFRecord: length, its CRC, data, its CRC."""
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                yield None
                return
            length, crc = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != crc:
                raise DecodeError
            data, end = file.read(length), file.read(4)
            if len(end) < 4:
                yield None
                return
            if masked_crc32c(data) != struct.unpack("<I", end)[0]:
                raise DecodeError
            yield data
