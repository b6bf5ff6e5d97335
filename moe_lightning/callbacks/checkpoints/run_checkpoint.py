"""Checkpoints of a run: the best by a monitored value, and always the newest as `last.ckpt`."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.checkpoints.exact_resume import rewind
from moe_lightning.utils.checkpoint_file import NotPlainError, NotWrittenError, check_plain
from moe_lightning.utils.files import atomic_symlink

#: What `ModelCheckpoint` keeps of the files it ranks.
_RANKING = ("best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score", "current_score")
#: Between the parts of a file name's pattern, and the values they name.
_DASH = re.compile(r"-(?![^{}]*\})")
_FIELD = re.compile(r"\{([^}:]*)")


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, whose `last.ckpt` is the newest whole state, and whose scores are of their step.

    With `save_last`, `last.ckpt` is written at every save, whether or not the monitored value was among the best, and
    where training ends: by its steps, epochs or time, by Ctrl-C or SIGTERM (`GracefulStop`), or, in a run of one
    process, by an exception. A value of an earlier validation neither ranks a checkpoint nor is in its name: where
    a validation follows, the save waits for it; else the file is named by its step alone.

    A disk that is full costs a warning and is tried again at the next save; only if the newest state could not be
    written in the end is that an error. A folder that holds the `last.ckpt` of another run is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._validated_step = -1
        self._validation_metrics: set[str] = set()
        self._stepping = -1  # the step that an optimizer is about to take
        self._training = False  # in a folder that is this run's
        self._not_written: Exception | None = None  # why the newest state is not on the disk

    @override
    @property
    def state_key(self) -> str:
        """As Lightning's, so that older checkpoints bring back their ranking."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def saved_path(self, step: int) -> str | None:
        """Relative path of the file that was written last; None if that is not of this step."""
        return os.path.relpath(self._last_checkpoint_saved) if self._last_global_step_saved == step else None

    # ---- when --------------------------------------------------------------------------------------------
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder of another run, and, before the first save, what could not be resumed from."""
        super().on_train_start(trainer, pl_module)
        self._check_folder(trainer)
        self._last_global_step_saved = trainer.global_step  # a resumed state is on the disk
        self._validated_step, self._stepping, self._not_written = -1, -1, None
        data = trainer.datamodule  # type: ignore[attr-defined]
        check_plain(
            {
                "callbacks": call._call_callbacks_state_dict(trainer),
                pl_module.CHECKPOINT_HYPER_PARAMS_KEY: dict(pl_module.hparams),
                **({} if data is None else {data.CHECKPOINT_HYPER_PARAMS_KEY: dict(data.hparams)}),
            }
        )
        self._training = True

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Every so many steps or so much time; where a validation follows, after it."""
        due = self._defer_save_until_validation or self._interval_is_over(trainer)
        epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._defer_save_until_validation = due and epoch_loop._should_check_val_fx(fetcher)
        if due and not self._defer_save_until_validation:
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A save that waited for it, or that is due by epochs."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_step = trainer.global_step
        self._validation_metrics.update(trainer._logger_connector.metrics["callback"])
        due = self._defer_save_until_validation or (
            not self._should_save_on_train_epoch_end(trainer) and self._epochs_are_over(trainer)
        )
        self._defer_save_until_validation = False
        if due:
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._should_save_on_train_epoch_end(trainer) and self._epochs_are_over(trainer):
            self._save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        self._training = False

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run whose newest state is lost has failed."""
        if self._not_written is not None:
            raise ValueError(str(self._not_written)) from self._not_written

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        """Until the end of the step the weights are those of neither step."""
        self._stepping = trainer.global_step

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the state, if it is that of a whole step. Not with several ranks: the others do not take part."""
        wanted = self._training and (self.save_last or self.save_on_exception)
        if trainer.world_size > 1 or self._should_skip_saving_checkpoint(trainer) or not wanted:
            return
        try:
            if reason := self._not_whole(trainer, pl_module):
                rank_zero_warn(f"checkpoint: step {trainer.global_step} is not saved, {reason}")
            elif not isinstance(exception, NotPlainError):  # it would be refused again
                self._save(trainer)
        except Exception as error:  # the first one is to be seen
            rank_zero_warn(f"checkpoint: step {trainer.global_step} is not saved, got {' '.join(str(error).split())}")

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whenever it is made, training goes on from it after the last whole step."""
        if trainer.state.fn == TrainerFn.FITTING:
            rewind(trainer, checkpoint)

    def _check_folder(self, trainer: L.Trainer) -> None:
        """What another run wrote last is not overwritten."""
        if trainer.fast_dev_run or not self.save_last:  # type: ignore[attr-defined]
            return
        last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        resumed, folder = trainer.ckpt_path, Path(str(self.dirpath)).resolve()
        continued = last == self.last_model_path or (resumed and Path(resumed).resolve().parent == folder)
        if self.file_exists(last, trainer) and not continued:
            path = os.path.relpath(last)
            raise ValueError(
                f"checkpoint: dirpath must not hold the newest state of another run, got {path}; continue that run "
                f"with --ckpt_path {path}, or choose another folder"
            )

    def _interval_is_over(self, trainer: L.Trainer) -> bool:
        """Of steps or of time; the ranks agree on the time."""
        if self._should_skip_saving_checkpoint(trainer):
            return False
        if self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0:
            return True
        if self._train_time_interval is None:
            return False
        now = time.monotonic()
        assert self._last_time_checked is not None
        over = now - self._last_time_checked >= self._train_time_interval.total_seconds()
        over = trainer.strategy.broadcast(over)
        if over:
            self._last_time_checked = now
        return over

    def _epochs_are_over(self, trainer: L.Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _not_whole(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
        """Why the weights are of no use."""
        if self._stepping == trainer.global_step:
            return "the optimizer was in the middle of a step"
        if not all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters()):
            return "its weights are not finite"
        return None

    # ---- what --------------------------------------------------------------------------------------------
    def _save(self, trainer: L.Trainer) -> None:
        """The file of this step, if it ranks, and `last.ckpt`; a full disk costs a warning and a new try."""
        saved = self._should_skip_saving_checkpoint(trainer)
        if saved and self._not_written is None:
            return
        candidates = self._monitor_candidates(trainer)
        ranking = {name: getattr(self, name) for name in _RANKING}
        self.best_k_models = dict(self.best_k_models)
        self._not_written = None
        try:
            if not saved:
                self._save_topk_checkpoint(trainer, candidates)
        except NotWrittenError as error:
            vars(self).update(ranking)
            self._warn(error)
        try:
            if self.save_last:
                self._save_last_checkpoint(trainer, candidates)
                self._not_written = None
        except NotWrittenError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._not_written = error
        rank_zero_warn(f"{error}; training goes on and tries again")

    @override
    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Without a value of this step it cannot rank; it is kept only where all are."""
        unknown = self._validated_step >= 0 and self.monitor not in trainer.callback_metrics  # which is an error
        if self.monitor is None or self.monitor in monitor_candidates or unknown:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_top_k == -1:
            path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer)
            self._save_checkpoint(trainer, path)

    @override
    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Always under one name; a link only to a file of this step."""
        path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        previous, self.last_model_path = self.last_model_path, path
        if self.save_last == "link" and self._last_global_step_saved == trainer.global_step:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, path)
        else:
            self._save_checkpoint(trainer, path)
        if previous and self._should_remove_checkpoint(trainer, previous, path):
            self._remove_checkpoint(trainer, previous)

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """As Lightning's; every rank learns whether rank zero could write the file."""
        failed: Exception | None = None
        try:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        except (NotWrittenError, NotPlainError) as error:
            failed = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait
        failed = trainer.strategy.broadcast(failed)
        if failed is not None:
            raise failed
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @override
    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            atomic_symlink(Path(linkpath), Path(filepath))
        trainer.strategy.barrier()

    # ---- names and scores --------------------------------------------------------------------------------
    @override
    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Without what a validation of an earlier step measured, which Lightning keeps."""
        candidates = super()._monitor_candidates(trainer)
        if self._validated_step != trainer.global_step:
            for name in self._validation_metrics:
                candidates.pop(name, None)
        return candidates

    @override
    def _format_checkpoint_name(
        self,
        filename: str | None,
        metrics: dict[str, Tensor],
        prefix: str | None = None,
        auto_insert_metric_name: bool = True,
    ) -> str:
        """Parts of the pattern whose value is not known are left out, where Lightning writes 0."""
        parts = _DASH.split(filename or "{epoch}-{step}")
        known = [part for part in parts if all(name in metrics for name in _FIELD.findall(part))]
        if not known:
            known, auto_insert_metric_name = ["{step}"], True
        name = self.CHECKPOINT_JOIN_CHAR.join(known)
        return super()._format_checkpoint_name(name, metrics, prefix, auto_insert_metric_name)
