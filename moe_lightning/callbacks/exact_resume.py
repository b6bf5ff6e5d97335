"""Randomness that survives a restart in mid-epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


class ExactResume(L.Callback):
    """Stores torch's random states in the checkpoint and puts them back before the first step after a resume.

    With the loader's position, which the loader stores itself, dropout and order continue as if nothing had happened.
    The states are those of rank zero; every rank seeds alike, so they are every rank's.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """CPU state, and that of the current CUDA device if it has been used."""
        states: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training begins: set-up may still draw numbers."""
        self._restore = state_dict

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the states back, once."""
        if self._restore is None:
            return
        states, self._restore = self._restore, None
        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"].cpu())
