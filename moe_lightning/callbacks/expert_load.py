"""Load of the experts in every MoE layer: figures at the logging interval, a heat map every so often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from moe_lightning.callbacks.heat_map import add_counts, add_heat_map
from moe_lightning.callbacks.layer_watch import LayerWatch
from moe_lightning.callbacks.stage import at_log_step, log_metrics, moe_layers
from moe_lightning.layers import MoE
from moe_lightning.metrics import ExpertLoad, ExpertLoadSummary
from moe_lightning.utils.checks import check_not_negative


class ExpertLoadMonitor(LayerWatch):
    """Logs expert_load/* (over all layers) and expert_load_layer/*: max/mean, CV, dead experts, dropped share.

    Counts come from the MoE layers themselves, in any LightningModule, and are summed over micro-batches and ranks
    before any ratio is taken. Nothing waits for the GPU between two logging steps. Validation counts are logged as
    expert_load_val/*; the sanity check is not counted. Where experts are spread over ranks,
    expert_load/rank_max_over_mean and rank_cv are the skew of the ranks' loads. TensorBoard's files get the counts too,
    as a tensor.

    Args:
        enabled: off costs nothing.
        per_layer: also log each layer by itself.
        image_every_n_steps: optimizer steps between heat maps (layers x experts); 0: none.
    """

    def __init__(self, enabled: bool = True, per_layer: bool = True, image_every_n_steps: int = 100) -> None:
        super().__init__()
        check_not_negative("expert_load", "image_every_n_steps", image_every_n_steps)
        self.enabled = enabled
        self.per_layer = per_layer
        self.image_every_n_steps = image_every_n_steps
        self._interval: ExpertLoad | None = None
        self._run: ExpertLoad | None = None
        self._evaluation: ExpertLoad | None = None
        self._last_image = 0
        self._ranks = 1

    def to_watch(self, pl_module: L.LightningModule) -> Sequence[MoE]:
        """All MoE layers, with a metric of their size on the module's device; none when off."""
        layers = moe_layers(pl_module) if self.enabled else []
        sizes = sorted({layer.router.num_experts for layer in layers})
        if len(sizes) > 1:
            raise ValueError(
                f"expert_load: all MoE layers must have equally many experts, got num_experts={sizes}; set "
                "expert_load.enabled=false"
            )
        if layers:
            made = [ExpertLoad(len(layers), sizes[0]).to(pl_module.device) for _ in range(3)]
            self._interval, self._run, self._evaluation = made
        else:
            self._interval = self._run = self._evaluation = None
        return layers

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See over how many ranks the strategy has spread the experts."""
        if self.layers:
            self._ranks = self.layers[0].dispatcher.ranks

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; log at the interval (all ranks: the counts are reduced)."""
        if self._interval is None or self._run is None:
            return
        tokens_per_expert_LE, slots_L = self.load()
        self._interval.update(tokens_per_expert_LE, slots_L)
        self._run.update(tokens_per_expert_LE, slots_L)
        if at_log_step(trainer):
            self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from zero."""
        super().on_validation_start(trainer, pl_module)
        if self._evaluation is not None:
            self._evaluation.reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a validation batch."""
        if self._evaluation is not None and not trainer.sanity_checking:
            self._evaluation.update(*self.load())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the load of validation."""
        if self._evaluation is not None and not trainer.sanity_checking:
            log_metrics(trainer, _figures("expert_load_val", self._evaluation.compute()))

    def run_load(self) -> ExpertLoadSummary | None:
        """Load over the whole training run so far, all ranks (a collective); None if nothing was counted."""
        if self._run is None or self._run.update_count == 0:
            return None
        return self._run.compute()

    def _log(self, trainer: L.Trainer) -> None:
        assert self._interval is not None
        summary = self._interval.compute()
        self._interval.reset()
        metrics = _figures("expert_load", summary)
        if self._ranks > 1:
            of_ranks = summary.of_ranks(self._ranks)
            metrics["expert_load/rank_max_over_mean"] = float(of_ranks.max_over_mean_L.mean())
            metrics["expert_load/rank_cv"] = float(of_ranks.cv_L.mean())
        if self.per_layer:
            for layer in range(len(summary.cv_L)):
                metrics[f"expert_load_layer/L{layer}/max_over_mean"] = float(summary.max_over_mean_L[layer])
                metrics[f"expert_load_layer/L{layer}/cv"] = float(summary.cv_L[layer])
        log_metrics(trainer, metrics)
        add_counts(trainer, summary.counts_LE)
        step = trainer.global_step
        if self.image_every_n_steps and (not self._last_image or step - self._last_image >= self.image_every_n_steps):
            self._last_image = step
            add_heat_map(trainer, summary.counts_LE)


def _figures(prefix: str, summary: ExpertLoadSummary) -> dict[str, float]:
    """Means over layers, and the sum of dead experts."""
    return {
        f"{prefix}/max_over_mean": float(summary.max_over_mean_L.mean()),
        f"{prefix}/cv": float(summary.cv_L.mean()),
        f"{prefix}/dead_experts": float(summary.dead_experts_L.sum()),
        f"{prefix}/dropped": float(torch.nan_to_num(summary.dropped_L).mean()),
    }
