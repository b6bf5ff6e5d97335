"""Load of experts for TensorBoard: the counts, and a picture of them.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from moe_lightning.callbacks.stage import logged_step, tensorboard_loggers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Tag of the counts, int32 (L layers, E experts), since the last logging step.
COUNTS_TAG = "expert_load/tokens_per_expert"

#: Heat maps show load / mean on a log2 scale from 1 / LOAD_CAP over 1 to LOAD_CAP, in every run and at every step,
#: so that two of them can be compared by eye. What lies outside has a colour of its own.
LOAD_CAP = 4.0
_OVER, _UNDER, _NOTHING = "#ffd400", "#101010", "#9a9a9a"


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
    colours = colormaps["coolwarm"].with_extremes(over=_OVER, under=_UNDER, bad=_NOTHING)
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
