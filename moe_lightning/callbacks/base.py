"""What callbacks share: questions to a trainer, and the passes of MoE layers at hand, seen by hooks on them.

Legend: L MoE layers, E experts, K top_k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from moe_lightning.layers import MoE
from moe_lightning.layers.recompute import in_backward


class LayerCall(NamedTuple):
    """One forward pass of a layer."""

    layer: int
    shape: torch.Size
    """Of the tokens, (B, S) in most models."""
    tokens_per_expert_E: Tensor | None = None
    invalid_rows: Tensor | None = None
    slots: int = 0
    """T * K."""


class LayerWatch(L.Callback):
    """A callback that sees every forward pass of a module's MoE layers while it is trained, validated or tested.

    A pass that autograd repeats in backward (activation checkpointing) is not seen again. Nothing waits for the device.
    A subclass that overrides a hook of this class calls it too.
    """

    def __init__(self) -> None:
        #: Passes of the batch at hand.
        self.calls: list[LayerCall] = []
        self.layers: list[MoE] = []
        self._hooks: list[RemovableHandle] = []

    def to_watch(self, pl_module: L.LightningModule) -> Sequence[nn.Module]:
        """The layers that get hooks."""
        return moe_layers(pl_module)

    @property
    def watching(self) -> bool:
        """Whether any layer has a hook."""
        return bool(self._hooks)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach the hooks, now that `configure_model` has made all layers."""
        self._attach(pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._hooks:
            self._attach(pl_module)

    on_test_start = on_validation_start

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.calls.clear()

    @override
    def on_validation_batch_start(self, *_: Any) -> None:
        self.calls.clear()

    @override
    def on_test_batch_start(self, *_: Any) -> None:
        self.calls.clear()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._detach()

    def load(self) -> tuple[Tensor, Tensor]:
        """Of the batch: tokens per expert, int32 (L, E), and the T * K slots offered to each layer, int64 (L)."""
        idle_E = self._zero().expand(self.layers[0].router.num_experts)
        counts = [idle_E] * len(self.layers)
        slots_L = torch.zeros(len(self.layers), dtype=torch.int64)
        for call in self.calls:
            assert call.tokens_per_expert_E is not None
            before = counts[call.layer]
            counts[call.layer] = call.tokens_per_expert_E + before if slots_L[call.layer] else call.tokens_per_expert_E
            slots_L[call.layer] += call.slots
        return torch.stack(counts), slots_L

    def invalid_rows(self) -> Tensor:
        """Of the batch, all layers together: int32 scalar on their device."""
        counts = [call.invalid_rows for call in self.calls if call.invalid_rows is not None]
        return torch.stack([self._zero(), *counts]).sum()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32, device=self.layers[0].router.weight.device)

    def _attach(self, pl_module: L.LightningModule) -> None:
        self._detach()
        self.layers = moe_layers(pl_module)
        self._hooks = [
            layer.register_forward_hook(partial(self._called, number))
            for number, layer in enumerate(self.to_watch(pl_module))
        ]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.calls.clear()

    @torch.compiler.disable  # it would be compiled again and again for each layer and callback
    def _called(self, number: int, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if in_backward():
            return
        if not isinstance(layer, MoE):
            self.calls.append(LayerCall(number, inputs[0].shape))
            return
        selection = output[1].selection
        self.calls.append(
            LayerCall(
                number,
                inputs[0].shape[:-1],
                selection.tokens_per_expert_E,
                selection.invalid_rows,
                math.prod(inputs[0].shape[:-1]) * layer.router.top_k,
            )
        )


class MicroBatchTiming(L.Callback, ABC):
    """A callback that times some micro-batches, by events that a CUDA graph may hold."""

    _attached = False

    @abstractmethod
    def _set_attached(self, on: bool) -> None:
        """Set `_attached`, and the hooks that record events."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether no times wait for the device."""

    @property
    def is_timing(self) -> bool:
        """Whether the micro-batch at hand is timed."""
        return self._attached

    @contextmanager
    def timing(self, on: bool) -> Iterator[None]:
        """Time the passes meanwhile, or do not, whatever the micro-batch: one that is captured in a CUDA graph."""
        attached = self._attached
        self._set_attached(on)
        try:
            yield
        finally:
            self._set_attached(attached)


def most_tokens(calls: Sequence[LayerCall]) -> int:
    """Tokens of the layer that saw the most."""
    of_layer: dict[int, int] = {}
    for call in calls:
        of_layer[call.layer] = of_layer.get(call.layer, 0) + math.prod(call.shape)
    return max(of_layer.values(), default=0)


def moe_layers(module: nn.Module) -> list[MoE]:
    """The MoE layers of a model, first to last."""
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """To every logger, at Lightning's own step count."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=logged_step(trainer))


def tensorboard_loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Those that write here: none but on rank zero."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero]


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a run's event files, whichever of its loggers writes them; a collective.

    None without a logger that has a folder.
    """
    folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    folder = trainer.strategy.broadcast(folders[0]) if folders else trainer.log_dir if trainer.loggers else None
    return None if folder is None else Path(folder)


def logged_step(trainer: L.Trainer) -> int:
    """The optimizer-step count of Lightning's own logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def at_log_step(trainer: L.Trainer) -> bool:
    """Whether this training batch ends an optimizer step that Lightning logs."""
    accumulating = trainer.fit_loop.epoch_loop._should_accumulate()
    return trainer._logger_connector.should_update_logs and not accumulating


def compute_dtype(trainer: L.Trainer) -> torch.dtype:
    """The dtype of the run's matrix products."""
    name = str(trainer.precision).split("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(name, torch.float32)


def copy_to_host(count: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """To the host without waiting; the event is recorded after the copy."""
    if not count.is_cuda:
        return count, None
    pinned = torch.empty_like(count, device="cpu", pin_memory=True)
    pinned.copy_(count, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return pinned, copied
