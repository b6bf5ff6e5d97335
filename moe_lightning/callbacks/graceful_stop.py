"""SIGTERM ends a run at a step boundary, on all ranks at the same one, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from moe_lightning.callbacks.stage import copy_to_host

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class GracefulStop(L.Callback):
    """A signal to any rank stops every rank after the same optimizer step; each then exits with status 143.

    Lightning's own handler starts a collective inside the signal handler, in which a rank that got no signal takes no
    part. Here the handler takes a note; after each step the ranks take the maximum of their notes, and read it a step
    later, so that no step waits.
    """

    def __init__(self) -> None:
        self._asked = False
        self._seen: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nobody has asked yet."""
        self._asked, self._seen = False, None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in training: the note is read after the first step."""
        _install(self._take_note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it puts in just before, and takes out itself at the end."""
        self._step = trainer.global_step
        _install(self._take_note)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Outside of a fit there is nothing to keep: a signal ends the process."""
        if trainer.state.fn != TrainerFn.FITTING:
            _install(_leave)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        _install(_leave)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        _install(_leave)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: stop if any rank was asked to by the end of the one before."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        stop = self._asked
        if trainer.world_size > 1:
            stop = self._any_had_asked()
            asked = torch.full((), int(self._asked), device=pl_module.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self._seen = copy_to_host(asked)
        if stop:
            self._stop(trainer)

    def _any_had_asked(self) -> bool:
        """What the ranks found after the step before."""
        if self._seen is None:
            return False
        asked, copied = self._seen
        if copied is not None:
            copied.synchronize()
        return bool(asked)

    def _take_note(self, _signal: int, _frame: Any) -> None:
        self._asked = True

    def _stop(self, trainer: L.Trainer) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None and trainer.checkpoint_callback is not None:
            folder = os.path.join(trainer.default_root_dir, "checkpoints")
        if folder is not None:
            path = Path(folder) / f"stopped-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            rank_zero_info(f"SIGTERM: stopped after step {trainer.global_step}; go on with --ckpt_path {path}")
        raise SystemExit(STATUS)


def _install(handler: Any) -> None:
    """Signals can be handled in the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _leave(_signal: int, _frame: Any) -> None:
    raise SystemExit(STATUS)
