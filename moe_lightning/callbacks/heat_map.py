"""Load of experts for TensorBoard: the counts, and a picture of them."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from moe_lightning.callbacks.stage import logged_step, tensorboard_loggers

#: Tag of the counts, int32 (L layers, E experts), since the last logging step.
COUNTS_TAG = "expert_load/tokens_per_expert"


def add_counts(trainer: L.Trainer, counts_LE: Tensor) -> None:
    """Keep counts (L, E) as a tensor, for the report: no TensorBoard tab shows those."""
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_tensor(COUNTS_TAG, counts_LE.to("cpu", torch.int32), global_step=logged_step(trainer))


def add_heat_map(trainer: L.Trainer, counts_LE: Tensor) -> None:
    """Draw counts (L layers, E experts), each over its layer's mean, for every TensorBoard logger of rank zero."""
    loggers = tensorboard_loggers(trainer)
    if not loggers:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    load_LE = (counts_LE.float() / counts_LE.float().mean(1, keepdim=True)).cpu()
    layers, experts = load_LE.shape
    figure = Figure(figsize=(max(4.0, 0.35 * experts + 2), max(2.5, 0.35 * layers + 1.2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(load_LE.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer", title="load / mean load")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image)
    for logger in loggers:
        logger.experiment.add_figure("expert_load/heat_map", figure, global_step=logged_step(trainer))
