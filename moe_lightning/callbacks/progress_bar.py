"""A progress bar that does not wait for the GPU on every step."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, reading the metrics only where they are logged: reading one waits for the device."""

    def _update_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if not trainer.training or trainer._logger_connector.should_update_logs:
            super()._update_metrics(trainer, pl_module, *args, **kwargs)

    def _get_train_description(self, current_epoch: int) -> str:
        """Without the number of epochs where it is unbounded."""
        if self.trainer.max_epochs == -1:
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)
