"""A resume that continues exactly: random states, and the place after the last whole optimizer step."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from typing_extensions import override


def unfinished_batches(trainer: L.Trainer) -> int:
    """Batches fetched since the last whole optimizer step: the one in work, and those only accumulated."""
    epoch_loop = trainer.fit_loop.epoch_loop
    progress: Any = epoch_loop.batch_progress.current
    in_work = progress.ready - progress.processed
    if not in_work and epoch_loop._num_ready_batches_reached():  # the last batch of an epoch ends a step
        return 0
    return int(in_work + progress.processed % trainer.accumulate_grad_batches)


def rewind(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint one of the end of the last whole step's batch, from which a resume is exact.

    A batch in work or only accumulated is trained again. A validation in work is left out, as Lightning leaves out one
    that follows a checkpoint. The end of training in mid-epoch, which Lightning counts as the end of the epoch, is not
    counted.

    Args:
        trainer: at any moment of a fit.
        checkpoint: what it has just dumped; its entry "loops" is changed.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    unfinished = unfinished_batches(trainer)
    if batches["total"]["ready"] == unfinished:
        return  # no step yet
    accumulated = unfinished - (batches["current"]["ready"] - batches["current"]["processed"])
    for tracker in (batches["total"], batches["current"]):
        whole = tracker["ready"] - unfinished
        tracker.update(ready=whole, started=whole, processed=whole, completed=whole - 1)
    batches["is_last_batch"] = batches["is_last_batch"] and not unfinished
    for tracker in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        begun = tracker["started"]
        tracker.update(ready=begun, started=begun, processed=begun - 1, completed=begun - 1)
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for tracker in (validation["total"], validation["current"]):
        tracker.update(dict.fromkeys(tracker, 0))
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
    for loader in loops["state_dict"].get("combined_loader", []):
        if "batches" in loader:  # of a TrainLoader, which leaves out the batch in work itself
            loader["batches"] -= accumulated


class ExactResume(L.Callback):
    """Stores torch's random states in the checkpoint and puts them back before the first step after a resume.

    With the loader's position, which the loader stores itself, dropout and order continue as in a run without a break.
    The states are those of rank zero; every rank has the same seed, so they are every rank's. Within a step they are
    those of its beginning, for it is trained again.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None
        self._step_began: dict[str, Any] | None = None  # None between steps

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._step_began or _states()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training begins: set-up may still draw numbers."""
        self._restore = state_dict

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if self._restore is not None:
            states, self._restore = self._restore, None
            torch.set_rng_state(states["cpu"].cpu())
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"].cpu())
        if self._step_began is None:
            self._step_began = _states()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not unfinished_batches(trainer):
            self._step_began = None


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
