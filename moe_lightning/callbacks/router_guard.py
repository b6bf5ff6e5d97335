"""Stops a run whose router saw NaN, infinity, or too few experts, with one error on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.base import LayerWatch, copy_to_host


class RouterGuard(LayerWatch):
    """Reads each batch's count of invalid rows one batch late on a GPU, so that no step waits, at once on the CPU.

    The count is that of the MoE layers, in any LightningModule. Validation and test are watched too, and a checkpoint
    is never written while a count is unread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._watch()

    @override
    def on_validation_batch_end(self, *_: Any) -> None:
        self._watch()

    @override
    def on_test_batch_end(self, *_: Any) -> None:
        self._watch()

    @override
    def on_train_end(self, *_: Any) -> None:
        self._check()

    @override
    def on_validation_end(self, *_: Any) -> None:
        self._check()

    @override
    def on_test_end(self, *_: Any) -> None:
        self._check()

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        """Never store weights that an invalid row may have changed."""
        self._check()

    def _watch(self) -> None:
        if not self.layers:
            return
        self._check()
        invalid_rows = self.invalid_rows()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(invalid_rows)
        self._pending = copy_to_host(invalid_rows)
        if not invalid_rows.is_cuda:
            self._check()

    def _check(self) -> None:
        if self._pending is None:
            return
        invalid_rows, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        count = int(invalid_rows)
        if count:
            raise ValueError(
                f"router: logits must be finite with at least top_k experts unmasked, got {count} invalid rows in a "
                "batch; lower the learning rate, clip gradients, or resume from an older checkpoint"
            )
