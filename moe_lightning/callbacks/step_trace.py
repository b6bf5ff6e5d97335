"""torch.profiler over a few steps, the phases of MoE layers as ranges, written as one gzip file."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from moe_lightning.callbacks.nesting import nest
from moe_lightning.callbacks.phase_ranges import LayerRanges
from moe_lightning.layers import MoE, with_mark, without_mark
from moe_lightning.utils.files import atomic_path

#: Where traces go unless told otherwise.
FOLDER = "log/moe_trace"


def make_folder(folder: Path | str) -> Path:
    """Raise ValueError where there can be none."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"trace: the folder must be one that can be written, got {folder} ({error.strerror}); choose another"
        ) from error
    return path


class StepTrace:
    """Traces `active` steps after `wait` and `warmup` ones into <folder>/<worker>.<time>.pt.trace.json.gz.

    Layers carry marks only during the steps that are recorded.

    Args:
        layers: whose phases become ranges.
        device: whose kernels are recorded beside what the host does.
        folder: made if it is not there.
        worker: what the file's name begins with; by rank, for a file each.
        wait: steps before anything is done.
        warmup: steps with the profiler on and nothing kept.
        active: steps that are kept.
    """

    def __init__(
        self,
        layers: Sequence[MoE],
        device: torch.device,
        folder: Path | str,
        worker: str,
        wait: int,
        warmup: int,
        active: int,
    ) -> None:
        self._folder, self._worker = make_folder(folder), worker
        self._layers = [(layer, LayerRanges(i)) for i, layer in enumerate(layers)]
        self._left = wait + warmup + active
        #: Steps, so far.
        self.recorded = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._write,
        )
        #: The file, once it is written.
        self.path: Path | None = None
        self._profiler.start()

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self._left == 0

    def begin_step(self) -> None:
        """Put the marks in where this step is recorded."""
        if self._profiler.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
            self.recorded += 1
            for layer, ranges in self._layers:
                layer.mark = with_mark(layer.mark, ranges)

    def end_step(self) -> None:
        """Take them out; behind the last step, write the file."""
        self._take_out_marks()
        self._left -= 1
        if self.done:
            self._profiler.stop()
        else:
            self._profiler.step()

    def stop(self) -> None:
        """Break off before all steps are taken: those recorded so far are written."""
        self._take_out_marks()
        if not self.done:
            self._left = 0
            self._profiler.stop()

    def _take_out_marks(self) -> None:
        for layer, ranges in self._layers:
            layer.mark = without_mark(layer.mark, ranges)
            ranges.close()

    def _write(self, profiler: profile) -> None:
        if not self.recorded:
            return
        path = self._folder / f"{self._worker}.{time.time_ns()}.pt.trace.json.gz"
        with atomic_path(path) as temporary:
            try:
                profiler.export_chrome_trace(str(temporary))
            finally:
                temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)  # the profiler's own
            trace = json.loads(temporary.read_bytes())
            trace["traceName"] = path.name
            nest(trace["traceEvents"], "moe/")
            # Not json.dump, which encodes piece by piece in Python.
            temporary.write_bytes(gzip.compress(json.dumps(trace).encode(), compresslevel=6))
        self.path = path
