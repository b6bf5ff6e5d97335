"""Shows the text that `predict` generates."""

from __future__ import annotations

from typing import Any

import lightning as L
from rich import print as rich_print
from rich.panel import Panel
from rich.text import Text


class GenerationPrinter(L.Callback):
    """Prints each prompt with its continuation, on rank zero."""

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The prompt is bold."""
        if not trainer.is_global_zero:
            return
        decode = trainer.datamodule.decode  # type: ignore[attr-defined]
        for ids, prompt_ids in zip(outputs, batch, strict=True):
            text = Text(decode(prompt_ids), style="bold")
            text.append(decode(ids[prompt_ids.numel() :]), style="not bold")
            rich_print(Panel(text, title=f"prompt {batch_idx + 1}"))
