"""Ctrl-C and SIGTERM end a run at a step boundary, on all ranks at the same one, with a checkpoint."""

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
from typing_extensions import override

from moe_lightning.callbacks.base import copy_to_host
from moe_lightning.callbacks.checkpoints.run_checkpoint import RunCheckpoint


class Stopped(SystemExit):
    """A run that a signal ended; its code is what a shell reports of a process that the signal ended."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


class GracefulStop(L.Callback):
    """SIGINT or SIGTERM to any rank ends training on every rank after the same optimizer step, with status 130 or 143.

    The end is that of a run that is over: `on_train_end`, where checkpoints are saved. A signal in a validation that
    belongs to training ends it at the next batch. A second Ctrl-C ends the process at once.

    Lightning's own handler starts a collective inside the signal handler, in which a rank that got no signal takes no
    part. Here the handler sets a flag; after each step, and each batch of a validation, the ranks all-reduce the flags,
    and read the maximum one step later, so that no step waits.
    """

    def __init__(self) -> None:
        self._signal_flag = 0  # the signal's number
        self._reduced: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._step = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._signal_flag, self._reduced = 0, None

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _install(self._set_flag)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers; it restores the earlier ones itself at the end."""
        self._step = trainer.global_step
        _install(self._set_flag)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Outside of a fit there is nothing to keep: a signal ends the process."""
        if trainer.state.fn != TrainerFn.FITTING:
            _install(_leave)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _install(_leave)

    on_predict_start = on_test_start

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_requested(trainer, pl_module)

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """In a fit; a validation may take longer than a process is given to end."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_if_requested(trainer, pl_module)

    def _stop_if_requested(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """If any rank had a signal at the call before; with one rank, at this one."""
        signal_number = self._signal_flag
        if trainer.world_size > 1:
            signal_number = self._stop_requested()
            flag = torch.full((), self._signal_flag, device=pl_module.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self._reduced = copy_to_host(flag)
        if signal_number:
            self._stop(trainer, signal_number)

    def _stop_requested(self) -> int:
        """The maximum of the ranks' flags at the call before."""
        if self._reduced is None:
            return 0
        flag, copied = self._reduced
        if copied is not None:
            copied.synchronize()
        return int(flag)

    def _set_flag(self, signal_number: int, _frame: Any) -> None:
        if self._signal_flag and signal_number == signal.SIGINT:
            os._exit(128 + signal_number)
        self._signal_flag = signal_number

    def _stop(self, trainer: L.Trainer, signal_number: int) -> None:
        if not trainer.sanity_checking:
            trainer.training = True  # and not validating
            trainer.fit_loop.on_run_end()
            name, step = signal.Signals(signal_number).name, trainer.global_step
            path = _newest(trainer)
            rank_zero_info(f"{name}: stopped after step {step}" + (f"; go on with --ckpt_path {path}" if path else ""))
        raise Stopped(signal_number)


def _newest(trainer: L.Trainer) -> str | None:
    """The checkpoint of the last step, written now if no callback has."""
    checkpoints = trainer.checkpoint_callback
    if checkpoints is None:
        return None
    if isinstance(checkpoints, RunCheckpoint):
        saved = checkpoints.saved_path(trainer.global_step)
        if saved is not None or checkpoints.save_last:  # else it could not be written, and a warning was given
            return saved
    folder = getattr(checkpoints, "dirpath", None) or os.path.join(trainer.default_root_dir, "checkpoints")
    path = Path(folder) / f"stopped-step={trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return os.path.relpath(path)


def _install(handler: Any) -> None:
    """Signals can be handled in the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, handler)


def _leave(signal_number: int, _frame: Any) -> None:
    raise Stopped(signal_number)
