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
from lightning.pytorch.utilities.rank_zero import rank_zero_info

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class GracefulStop(L.Callback):
    """A signal to any rank stops every rank after the same optimizer step; each then exits with status 143.

    Lightning's own handler starts a collective inside the signal handler, in which a rank that got no signal takes no
    part. Here the handler takes a note; after each step the ranks take the maximum of their notes, and read it a step
    later, so that no step waits.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._seen: torch.Tensor | None = None
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it puts in just before."""
        self._asked, self._seen, self._step = False, None, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take_note)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the place back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: stop if any rank was asked to by the end of the one before."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.world_size == 1:
            stop = self._asked
        else:
            stop = self._seen is not None and bool(self._seen)
            self._seen = torch.tensor(int(self._asked), device=pl_module.device)
            dist.all_reduce(self._seen, dist.ReduceOp.MAX)
        if stop:
            self._stop(trainer)

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
