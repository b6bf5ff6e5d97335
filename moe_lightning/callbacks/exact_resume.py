"""Randomness that survives a restart in mid-epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from moe_lightning.callbacks.whole_step import unfinished_batches


class ExactResume(L.Callback):
    """Stores torch's random states in the checkpoint and puts them back before the first step after a resume.

    With the loader's position, which the loader stores itself, dropout and order continue as if nothing had happened.
    The states are those of rank zero; every rank seeds alike, so they are every rank's. Within a step they are those of
    its beginning, for it is trained again.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None
        self._step_began: dict[str, Any] | None = None  # None between steps

    def state_dict(self) -> dict[str, Any]:
        """CPU state, and that of the current CUDA device if it has been used."""
        return self._step_began or _states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training begins: set-up may still draw numbers."""
        self._restore = state_dict

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the states back, once."""
        if self._restore is not None:
            states, self._restore = self._restore, None
            torch.set_rng_state(states["cpu"].cpu())
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"].cpu())
        if self._step_began is None:
            self._step_began = _states()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An optimizer step may take several batches."""
        if not unfinished_batches(trainer):
            self._step_began = None


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
