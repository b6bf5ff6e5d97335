"""The Custom Scalars tab of TensorBoard: loss, router time, load and exchange side by side."""

from __future__ import annotations

import lightning as L

from moe_lightning.callbacks.exchange_timing import ExchangeTiming
from moe_lightning.callbacks.expert_load import ExpertLoadMonitor
from moe_lightning.callbacks.router_timing import RouterTiming
from moe_lightning.callbacks.stage import moe_layers, tensorboard_loggers
from moe_lightning.callbacks.throughput import Throughput
from moe_lightning.expert_parallel.exchange import Watchable

#: Title of a chart to the regular expressions of its tags; a chart has one unit.
Charts = dict[str, list[str]]


class TensorBoardLayout(L.Callback):
    """Writes the layout when training starts: a category for each callback that is on and has something to log."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The strategy has put its dispatchers in by now, so whether there are exchanges is known."""
        layout = {
            category: {title: ["Multiline", tags] for title, tags in charts.items()}
            for category, charts in _categories(trainer, pl_module).items()
        }
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_custom_scalars(layout)


def _categories(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Charts]:
    layers = moe_layers(module)
    on = {type(callback) for callback in trainer.callbacks if getattr(callback, "enabled", False)}  # type: ignore[attr-defined]
    categories: dict[str, Charts] = {"loss": {"cross-entropy, nats a token": ["train/loss$", "val/loss$"]}}
    if layers:
        categories["loss"]["balancing losses"] = ["train/(balance|z)_loss$"]
    if layers and RouterTiming in on:
        categories["router time"] = {
            "T_route forward by part, ms": ["router_time/forward/T_(logit|select|index|permute|pack|route)_ms$"],
            "T_route backward by part, ms": ["router_time/backward/T_(logit|select|pack|route)_ms$"],
            "T_route, experts and step, ms": [
                "router_time/(forward|backward)/T_(route|experts|unpack)_ms$",
                "router_time/step_ms$",
            ],
            "T_route, share of the step": ["router_time/T_route_share$"],
        }
    if layers and ExpertLoadMonitor in on:
        categories["load"] = {
            "max / mean": ["expert_load(_val)?/(rank_)?max_over_mean$"],
            "CV": ["expert_load(_val)?/(rank_)?cv$"],
            "dropped share": ["expert_load(_val)?/dropped$"],
        }
    if ExchangeTiming in on and any(isinstance(layer.dispatcher, Watchable) for layer in layers):
        categories["exchange"] = {
            "in all, ms a micro-batch": ["exchange/.*_total_ms$"],
            "not hidden, ms a micro-batch": ["exchange/.*_exposed_ms$"],
            "GB/s": ["exchange/.*_gb_per_s$"],
        }
    if Throughput in on:
        categories["throughput"] = {"tokens a second": ["throughput/tokens_per_s$"]}
    return categories
