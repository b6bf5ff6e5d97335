"""A log that cannot be written does not end a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from moe_lightning.callbacks.stage import tensorboard_loggers
from moe_lightning.utils.files import os_error_of


class LogGuard(L.Callback):
    """Tells once of each logger that its disk is full, and goes on; what fits later is written again.

    TensorBoard's thread would end at the first error, and with it training; a record that was written in part would
    hide all after it from every reader.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stand between the loggers and those who log."""
        for logger in trainer.loggers:
            for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
                method = getattr(logger, name)
                if not isinstance(method, functools.partial):  # in a second fit it is there already
                    setattr(logger, name, functools.partial(_tolerant, logger, method))
        for logger in tensorboard_loggers(trainer):
            records = logger.experiment._get_file_writer().event_writer._async_writer._writer
            if not isinstance(records._writer, _EventFile):
                records._writer = _EventFile(records._writer)


class _EventFile:
    """Takes whole records or nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._path = os.fsdecode(file.filename)

    def write(self, record: bytes) -> None:
        size = os.path.getsize(self._path)
        try:
            self._file.write(record)
        except OSError as error:
            os.truncate(self._path, size)
            _tell(self._path, str(error.strerror))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _tolerant(logger: Logger, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return method(*arguments, **named)
    except Exception as error:
        cause = os_error_of(error)
        if cause is None:
            raise
        _tell(str(cause.filename or logger.log_dir), str(cause.strerror))
        return None


@functools.cache  # once of each file and reason
def _tell(path: str, reason: str) -> None:
    rank_zero_warn(f"logger: {path} cannot be written, got {reason}; training goes on, and what is logged is lost")
