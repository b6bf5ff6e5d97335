"""`train.py` that also writes, on each rank, what the expert-parallel tests compare."""

import hashlib
import json
import os
import signal
import time

import lightning as L
import torch
from ddp_run import losses, recording

from moe_lightning.callbacks import ExchangeTiming
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.data.loaders import TrainLoader
from moe_lightning.training.cli import MoECLI
from moe_lightning.training.graphed_step import GraphedStep
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.errors import plain_errors

torch.set_num_threads(1)
#: "what:rank:step", something bad that happens on one rank (or "all") after a step; several with commas.
FAULTS = os.environ.get("FAULT", "::").split(",")
#: "rank:every", whose batches of which numbers have one sequence alone.
SHORT = os.environ.get("SHORT", "")
#: Whether each micro-batch was done by a graph.
replays: list[bool] = []


def say(line: str) -> None:
    """In one write: ranks that speak at once share a file, and an unbuffered print has two."""
    os.write(1, f"{line}\n".encode())


def shortened(self, batches=TrainLoader.__iter__):
    rank, every = SHORT.split(":")
    for batch in batches(self):
        short = rank in (str(self._rank), "all") and self._position % int(every) == 0
        yield batch[:1] if short else batch


def counting(self, *arguments, run=GraphedStep.run):
    losses = run(self, *arguments)
    replays.append(losses is not None and self._memory is not None)
    return losses


class Fault(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for fault in FAULTS:
            what, rank, step = fault.split(":")
            if str(trainer.global_step) != step or rank not in (str(trainer.global_rank), "all"):
                continue
            say(f"fault at {time.monotonic()}")
            if what == "raise":
                raise RuntimeError(f"planted on rank {trainer.global_rank}")
            os.kill(os.getpid(), getattr(signal, what))


class ReportingCLI(MoECLI):
    def instantiate_trainer(self, **kwargs):
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, Fault())
        say(f"pid {os.getpid()}")
        return trainer

    def after_fit(self):
        shards = self.trainer.strategy._shards
        dense = [p for p in self.model.parameters() if p not in shards]
        timing = next(c for c in self.trainer.callbacks if isinstance(c, ExchangeTiming))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        facts = {
            "rank": self.trainer.global_rank,
            "losses": losses,
            "replays": replays,
            "exchange": timing.run_times(),
            "timed": len(timing._run.batches),
            "dense": hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in dense)).hexdigest(),
            "checks_splits": [
                getattr(layer.dispatcher, "debug_check_splits", None) for layer in moe_layers(self.model)
            ],
            "dispatchers": [type(layer.dispatcher).__name__ for layer in moe_layers(self.model)],
            "scale": scaler and scaler.get_scale(),
            "experts": [list(p.shape) for p in shards.parameters.values()],
        }
        with open(f"rank-{self.trainer.global_rank}.json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    LanguageModule.training_step = recording
    GraphedStep.run = counting
    if SHORT:
        TrainLoader.__iter__ = shortened
    with plain_errors():
        ReportingCLI()
