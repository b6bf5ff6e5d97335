"""Whether all ranks were started for the same run: others would wait for each other, or train on nonsense."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch.distributed as dist

from moe_lightning.data import TextDataModule
from moe_lightning.models.hyperparameters import plain_arguments

#: Attributes of the trainer by which the ranks' steps, and so their collectives, follow each other.
_STEPS = (
    "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "val_check_interval",
    "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps",
)  # fmt: skip
#: What may differ from host to host.
_OF_A_HOST = ("data.cache_dir", "data.num_workers")


def check_same_run(module: L.LightningModule) -> None:
    """Raise ValueError on every rank unless all have the same command, trainer, configuration and parameters."""
    mine = dict(_facts(module))
    of_ranks: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    first = of_ranks[0]
    for rank, theirs in enumerate(of_ranks[1:], 1):
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if names:
            got = ", ".join(f"{name}={first.get(name)} and {theirs.get(name)}" for name in names[:3])
            raise ValueError(
                f"strategy: all ranks must be started with the same settings, got on rank 0 and rank {rank} {got}; "
                "give all of them the same flags, files and seed"
            )


def _facts(module: L.LightningModule) -> Iterator[tuple[str, Any]]:
    trainer: L.Trainer = module.trainer
    yield "command", str(trainer.state.fn)
    for name in _STEPS:
        yield f"trainer.{name}", getattr(trainer, name)
    yield from _flat("model", plain_arguments(module.hparams))
    if (data := trainer.datamodule) is not None:  # type: ignore[attr-defined]
        yield from _flat("data", plain_arguments(data.hparams))
    if isinstance(data, TextDataModule):
        yield "seed_everything", os.environ.get("PL_GLOBAL_SEED")  # by which its loader shares batches out
    for name, parameter in module.named_parameters():
        yield name, tuple(parameter.shape)


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`{"optimizer": {"learning_rate": 1e-3}}` of a model as `model.optimizer.learning_rate`."""
    for key, value in settings.items():
        name = f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _flat(name, value)
        elif name not in _OF_A_HOST:
            yield name, value
