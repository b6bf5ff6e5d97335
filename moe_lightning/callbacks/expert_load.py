"""Load of the experts in every MoE layer: figures at the logging interval, a heat map every so often.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.base import logged_step, tensorboard_loggers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from collections.abc import Sequence
from typing import Any

from moe_lightning.callbacks.base import LayerWatch, at_log_step, log_metrics, moe_layers
from moe_lightning.layers import MoE
from moe_lightning.metrics import ExpertLoad, ExpertLoadSummary
from moe_lightning.utils.checks import check_installed, check_not_negative

#: Tag of the counts, int32 (L layers, E experts), since the last logging step.
COUNTS_TAG = "expert_load/tokens_per_expert"

#: Heat maps show load / mean on a log2 scale from 1 / LOAD_CAP over 1 to LOAD_CAP, in every run and at every step,
#: so that two of them can be compared by eye. What lies outside has a colour of its own.
LOAD_CAP = 4.0
_OVER, _UNDER, _NO_TOKENS = "#ffd400", "#101010", "#9a9a9a"


def add_counts(trainer: L.Trainer, counts_LE: Tensor) -> None:
    """Keep counts (L, E) as a tensor, for the report: no TensorBoard tab shows those."""
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_tensor(COUNTS_TAG, counts_LE.to("cpu", torch.int32), global_step=logged_step(trainer))


def add_heat_map(trainer: L.Trainer, counts_LE: Tensor) -> None:
    """Draw counts (L, E) for every TensorBoard logger of rank zero."""
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_figure("expert_load/heat_map", heat_map(counts_LE), global_step=logged_step(trainer))


def heat_map(counts_LE: Tensor) -> Figure:
    """Counts (L, E), each over its layer's mean, on the scale that all runs share; a layer without tokens is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    load_LE = (counts_LE.float() / counts_LE.float().mean(1, keepdim=True)).cpu()
    layers, experts = load_LE.shape
    figure = Figure(figsize=(max(4.0, 0.35 * experts + 2), max(2.5, 0.35 * layers + 1.2)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["coolwarm"].with_extremes(over=_OVER, under=_UNDER, bad=_NO_TOKENS)
    # An idle expert has no logarithm and would count as missing.
    shown_LE = load_LE.clamp(min=1e-6).numpy()
    scale = LogNorm(1 / LOAD_CAP, LOAD_CAP)
    image = axes.imshow(shown_LE, aspect="auto", cmap=colours, norm=scale, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, extend="both", label="load / mean load, log2 scale", format="{x:g}")
    bar.set_ticks([1 / LOAD_CAP, LOAD_CAP**-0.5, 1, LOAD_CAP**0.5, LOAD_CAP])
    bar.minorticks_off()
    return figure


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

    @override
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

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.layers:
            self._ranks = self.layers[0].dispatcher.ranks
            if self.image_every_n_steps and tensorboard_loggers(trainer):
                check_installed("expert_load.image_every_n_steps", "plots", "matplotlib")

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._interval is None or self._run is None:
            return
        tokens_per_expert_LE, slots_L = self.load()
        self._interval.update(tokens_per_expert_LE, slots_L)
        self._run.update(tokens_per_expert_LE, slots_L)
        if at_log_step(trainer):
            self._log(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._evaluation is not None:
            self._evaluation.reset()

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._evaluation is not None and not trainer.sanity_checking:
            self._evaluation.update(*self.load())

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
        f"{prefix}/max_violation": float(summary.max_violation_L.mean()),
        f"{prefix}/cv": float(summary.cv_L.mean()),
        f"{prefix}/dead_experts": float(summary.dead_experts_L.sum()),
        f"{prefix}/dropped": float(torch.nan_to_num(summary.dropped_L).mean()),
    }
