"""Whether all ranks were started for the same run: others would wait for each other for ever, or train on nonsense."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch.distributed as dist
import yaml

#: Attributes of the trainer by which the ranks' steps, and so their collectives, follow each other.
_STEPS = (
    "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "val_check_interval",
    "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps",
)  # fmt: skip


def check_same_run(module: L.LightningModule) -> None:
    """Raise ValueError on every rank unless all have the same command, trainer, configuration and parameters."""
    mine = dict(_facts(module))
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    first = found[0]
    for rank, theirs in enumerate(found[1:], 1):
        names = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if names:
            got = ", ".join(f"{name}={first.get(name)} and {theirs.get(name)}" for name in names[:3])
            raise ValueError(
                f"strategy: all ranks must be started with the same settings, got on rank 0 and rank {rank} {got}; "
                "give all of them the same flags, files and seed"
            )


def _facts(module: L.LightningModule) -> Iterator[tuple[str, Any]]:
    trainer = module.trainer
    yield "command", str(trainer.state.fn)
    for name in _STEPS:
        yield f"trainer.{name}", getattr(trainer, name)
    if config := getattr(module, "run_config", None):
        yield from _flat("", yaml.safe_load(config))
        yield "seed_everything", os.environ.get("PL_GLOBAL_SEED")  # by which the loader shares batches out
    for name, parameter in module.named_parameters():
        yield name, tuple(parameter.shape)


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`{"model": {"init_args": {"top_k": 2}}}` as `model.top_k`, as on the command line."""
    for key, value in settings.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from _flat(name, value)
        else:
            yield name, value
