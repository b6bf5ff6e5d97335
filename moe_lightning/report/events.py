"""TensorBoard's event files of one run, by TensorBoard's own reader.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import (
    AUDIO,
    COMPRESSED_HISTOGRAMS,
    HISTOGRAMS,
    IMAGES,
    SCALARS,
    TENSORS,
    EventAccumulator,
)
from tensorboard.util import tensor_util

from moe_lightning.callbacks.heat_map import COUNTS_TAG

#: All scalars and tensors (0), as little as can be of what is not read (1).
_KEPT = {SCALARS: 0, TENSORS: 0, IMAGES: 1, AUDIO: 1, HISTOGRAMS: 1, COMPRESSED_HISTOGRAMS: 1}


class Curve(NamedTuple):
    """A scalar over optimizer steps; what is not finite is left out."""

    steps: list[int]
    values: list[float]


class Load(NamedTuple):
    """Tokens per expert at a logging step, int (L, E)."""

    step: int
    counts_LE: np.ndarray[Any, Any]


class Events(NamedTuple):
    """What a run logged, by tag."""

    curves: dict[str, Curve]
    loads: list[Load]


def event_folders(path: Path) -> list[Path]:
    """Folders at or under `path` that hold event files; ValueError if there is no such folder or none in it."""
    if not path.is_dir():
        raise ValueError(f"report: a run must be a folder with event files, got {path}, which is no folder")
    found = sorted({file.parent for file in path.rglob("events.out.tfevents.*")})
    if not found:
        raise ValueError(f"report: a run must hold events.out.tfevents.* files, got {path} without; train one first")
    return found


def read_events(folder: Path) -> Events:
    """All scalars, and the load counts of `ExpertLoadMonitor`."""
    reader = EventAccumulator(str(folder), size_guidance=_KEPT).Reload()
    tags = reader.Tags()
    curves = {}
    for tag in tags["scalars"]:
        points = [(event.step, event.value) for event in reader.Scalars(tag) if math.isfinite(event.value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves[tag] = Curve(list(steps), list(values))
    tensors = reader.Tensors(COUNTS_TAG) if COUNTS_TAG in tags["tensors"] else []
    loads = [Load(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in tensors]
    return Events(curves, [load for load in loads if load.counts_LE.ndim == 2])
