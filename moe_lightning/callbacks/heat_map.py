"""Load of experts as a picture for TensorBoard."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from moe_lightning.callbacks.stage import logged_step


def add_heat_map(trainer: L.Trainer, counts_LE: Tensor) -> None:
    """Draw counts (L layers, E experts), each over its layer's mean, for every TensorBoard logger of rank zero."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not trainer.is_global_zero:
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
