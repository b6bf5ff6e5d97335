"""The benchmark and the RouterTiming callback say the same of one layer."""

from statistics import median

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from rich.progress import Progress
from torch.utils.data import DataLoader

from moe_lightning.bench import timers
from moe_lightning.bench.cli import Settings
from moe_lightning.bench.roofline import Peaks, Shape
from moe_lightning.bench.router.case import backward_parts, build_case, forward_parts
from moe_lightning.callbacks import RouterTiming

# Tokens beyond most caches: what a phase finds there is then nearly the same in a loop and in a layer.
SHAPE = Shape(tokens=16384, d_model=512, num_experts=16, top_k=2, mlp_hidden_dim=16, size=4)
TOLERANCE = 0.15
ATTEMPTS = 5
STEPS = 8
NAMES = {
    "forward": ("T_logit", "T_select", "T_pack", "T_route", "T_experts", "T_unpack"),
    # T_select takes a hundredth of T_route here and is compared as a part of it.
    "backward": ("T_logit", "T_pack", "T_route", "T_experts", "T_unpack"),
}


class OneLayer(L.LightningModule):
    """The benchmark's layer and input, trained with a learning rate of 0, so that it stays what it is."""

    def __init__(self, case):
        super().__init__()
        self.moe, self.x_TD = case.moe, case.x_TD.detach()
        self.upstream_TD = torch.randn_like(self.x_TD)

    def training_step(self, batch, _):
        # A tensor with a history, as an attention layer would hand on: its gradient is what ends T_logit.
        x_TD = (self.x_TD * torch.ones(1, requires_grad=True)).clone()
        y_TD, _ = self.moe(x_TD)
        return (y_TD * self.upstream_TD).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Steps(Logger):
    name, version = "steps", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(metrics)

    def log_hyperparams(self, *args, **kwargs): ...


def by_callback(case):
    """Median microseconds over steps, by direction and name."""
    logger = Steps()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=[RouterTiming(every_n_batches=1, layers_every_n_steps=1)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(OneLayer(case), DataLoader(range(STEPS), batch_size=1))
    steps = [metrics for metrics in logger.logged if "router_time_layer/L0/forward/T_route_ms" in metrics]
    assert len(steps) >= STEPS - 2
    return {
        (direction, name): 1e3 * median(m[f"router_time_layer/L0/{direction}/{name}_ms"] for m in steps)
        for direction, names in NAMES.items()
        for name in names
    }


def by_benchmark(case):
    """Microseconds of each part, by direction and name: with its data in the cache (eager), and with none (cold).

    A layer leaves each phase something between: how much depends on the machine's cache.
    """
    parts = {
        "forward": forward_parts(case.moe, case.x_TD, case.rows_out, True),
        "backward": backward_parts(case.moe, case.x_TD, case.rows_out, True, case.generator),
    }
    times = {}
    with Progress(disable=True) as progress:
        for direction, makes in parts.items():
            for whole in ("route", "layer"):
                del makes[whole]
            for name, measured in timers.measure_on_cpu(makes, 5, progress).items():
                times[direction, name] = measured["eager_us"].median, measured["cold_us"].median

    def add(direction, *names):
        return tuple(sum(columns) for columns in zip(*(times[direction, name] for name in names), strict=True))

    times["forward", "T_pack"] = add("forward", "T_index", "T_permute")
    for direction in ("forward", "backward"):
        times[direction, "T_route"] = add(direction, "T_logit", "T_select", "T_pack")
    return times


def gap(us, columns):
    """How far outside the columns, as a fraction of the nearer one."""
    return max(min(columns) / us - 1, us / max(columns) - 1, 0.0)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("router", ["naive_topk", "fused_select"])
def test_callback_and_benchmark_agree(router):
    """Each time within the tolerance in one attempt at least: other work on the machine only ever adds to one side."""
    settings = Settings(torch.device("cpu"), torch.float32, (router,), True, 10, 1.0, 0, 0.0, 7)
    timers.keep_freed_memory()
    with timers.threads(1):
        case = build_case(router, SHAPE, settings, Peaks(1e12, 1e12))
        gaps = {}
        for _ in range(ATTEMPTS):
            callback, benchmark = by_callback(case), by_benchmark(case)
            for key, us in callback.items():
                gaps[key] = min(gaps.get(key, 1.0), gap(us, benchmark[key]))
            if max(gaps.values()) <= TOLERANCE:
                break
    assert {key: value for key, value in gaps.items() if value > TOLERANCE} == {}
