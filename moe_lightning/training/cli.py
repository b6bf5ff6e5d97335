"""The command line: LightningCLI with short names, checkpoints that carry their configuration, and plain errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import get_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichModelSummary, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from moe_lightning.callbacks import (
    ExactResume,
    ExpertLoadMonitor,
    GenerationPrinter,
    RouterGuard,
    RouterTiming,
    RunSummary,
    Throughput,
)
from moe_lightning.training.checkpoint_io import VerifiedCheckpointIO, load_checkpoint
from moe_lightning.training.data import TextDataModule
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.training.names import expand_arguments, expand_config

_YAML = get_loader("yaml")
set_loader("moe_lightning", lambda text: expand_config(_YAML(text)), exceptions=(yaml.YAMLError,))


class MoECLI(LightningCLI):
    """`train.py fit|validate|test|predict`.

    A checkpoint given by `--ckpt_path` brings the model and data sections it was trained with, under whatever
    configuration files and flags say.
    """

    def __init__(self, args: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            LanguageModule,
            TextDataModule,
            subclass_mode_model=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "use_distributed_sampler": False,  # the loader shares batches out itself, resumably
                "callbacks": [ExactResume(), RouterGuard(), GenerationPrinter()],
            },
            args=args,
            **kwargs,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """YAML with short names; errors are raised, for `train.py` to show in one line."""
        parser = super().init_parser(**kwargs)
        parser.parser_mode = "moe_lightning"
        parser.exit_on_error = False
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that a configuration can tune, and the vocabulary that data hands to the model."""
        parser.add_lightning_class_args(RouterTiming, "router_timing")
        parser.add_lightning_class_args(ExpertLoadMonitor, "expert_load")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RichProgressBar, "progress_bar")
        parser.add_lightning_class_args(RichModelSummary, "model_summary")
        parser.add_lightning_class_args(RunSummary, "run_summary")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "step={step}-val_loss={val/loss:.3f}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "progress_bar.leave": False,
                "model_summary.max_depth": 3,
            }
        )
        parser.link_arguments(
            "data.vocab_size", "model.init_args.vocab_size", compute_fn=_padded_vocab, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Expand names, and put a checkpoint's own configuration before all others."""
        given = list(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(_checkpoint_config_first(expand_arguments(given)))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Checkpoints go through `VerifiedCheckpointIO` unless the configuration brings a CheckpointIO of its own."""
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(VerifiedCheckpointIO())
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`, where flags can still override it."""

    def after_instantiate_classes(self) -> None:
        """Hand the model the configuration that its checkpoints carry."""
        if self.subcommand is None:
            return
        dumped = yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand]))
        self.model.run_config = yaml.safe_dump({key: dumped[key] for key in ("model", "data")})


def _padded_vocab(vocab_size: int) -> int:
    """The next multiple of 64, which matrix units want; the ids behind the tokenizer's are never a target."""
    return -(-vocab_size // 64) * 64


def _checkpoint_config_first(arguments: list[str]) -> list[str]:
    """Insert the configuration stored in --ckpt_path's file right behind the subcommand."""
    path: str | None = None
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--ckpt_path":
            path = value if equals else next(iter(arguments[position + 1 : position + 2]), None)
    if path is None or not Path(path).suffix:  # "best", "last" and "hpc" are words of Lightning's
        return arguments
    stored = load_checkpoint(path).get("run_config")
    return [arguments[0], f"--config={stored}", *arguments[1:]] if stored else arguments
