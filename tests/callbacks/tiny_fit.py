"""A tiny MoE trained by a plain Trainer, with a logger that keeps what it is given and a clock that can be set."""

from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger

from moe_lightning.training.modules import DecoderMoEModule

LAYERS, EXPERTS, TOP_K, SEQ_LEN, BATCH = 2, 4, 2, 16, 2


class RecordingLogger(Logger):
    """`steps`: the metrics logged at each step, merged."""

    name, version = "recording", 0

    def __init__(self):
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs): ...


class Clock:
    """`perf_counter` in exact binary fractions of a second; only `tick` moves it."""

    def __init__(self, monkeypatch, *modules):
        self.now = 0.0
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def tick(self, units):
        """A unit is 1/1024 s, so that sums are exact."""
        self.now += units / 1024


MS = 1000 / 1024  # milliseconds of a unit


class Batches:
    """`count` fixed batches, a loader that Lightning leaves alone."""

    def __init__(self, count, batch=BATCH, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.batches = torch.randint(0, 64, (count, batch, SEQ_LEN + 1), generator=generator)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def tiny_model(**options):
    torch.manual_seed(0)
    return DecoderMoEModule(64, 16, 2, LAYERS, 16, EXPERTS, TOP_K, **options)


def fit(callbacks, model=None, batches=8, validation=None, **options):
    logger = RecordingLogger()
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": logger,
            "callbacks": callbacks,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **options,
        }
    )
    model = model or tiny_model()
    trainer.fit(model, Batches(batches), Batches(validation, seed=1) if validation else None)
    return logger.steps, trainer, model
