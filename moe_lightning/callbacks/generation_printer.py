"""Shows the text that `predict` generates."""

from __future__ import annotations

from typing import Any

import lightning as L
from rich import print as rich_print
from rich.panel import Panel
from rich.text import Text
from torch import Tensor


class GenerationPrinter(L.Callback):
    """Prints each prompt with its continuation, on rank zero; as ids where no datamodule can decode them."""

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
        data = trainer.datamodule  # type: ignore[attr-defined]
        decode = data.decode if hasattr(data, "decode") else _numbers
        for ids, prompt_ids in zip(outputs, batch, strict=True):
            text = Text(decode(prompt_ids), style="bold")
            text.append(decode(ids[prompt_ids.numel() :]), style="not bold")
            rich_print(Panel(text, title=f"prompt {batch_idx + 1}"))


def _numbers(ids: Tensor) -> str:
    return "".join(f"{token} " for token in ids.tolist())
