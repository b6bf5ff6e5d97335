"""The command line: LightningCLI with short names, checkpoints that carry their configuration, and plain errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import get_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from moe_lightning.callbacks import (
    ExactResume,
    ExchangeTiming,
    ExpertLoadMonitor,
    GenerationPrinter,
    GracefulStop,
    LogGuard,
    ModelSummary,
    OnnxExport,
    ProgressBar,
    RouterGuard,
    RouterTiming,
    RunCheckpoint,
    RunSummary,
    TensorBoardLayout,
    Throughput,
    Trace,
)
from moe_lightning.callbacks.base import tensorboard_loggers
from moe_lightning.data import TextDataModule
from moe_lightning.training.config import bounded, expand_arguments, expand_config
from moe_lightning.training.help import CommandParser, show_help
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.training.resume import Resume, VerifiedCheckpointIO, checkpoint_path
from moe_lightning.training.strategy import WatchedDDPStrategy
from moe_lightning.training.strategy.failing_ranks import watch_agent
from moe_lightning.utils.checks import check_int
from moe_lightning.utils.console import hide_framework_messages


def claim_run_folder(logger: Logger) -> None:
    """Make the next `version_N` of a logger that numbers its runs; the making is the claim.

    Lightning takes the number after the largest there is and makes the folder later, so runs that start together share
    one, and overwrite each other's checkpoints. A version that is given is left alone, as are folders elsewhere.

    Raises:
        ValueError: the folder cannot be made.
    """
    numbering: Any = logger
    given = getattr(logger, "_version", 0) is not None or not hasattr(logger, "_get_next_version")
    if given or "://" in str(logger.save_dir):
        return
    home = Path(os.path.expanduser(os.path.expandvars(str(logger.save_dir))), str(logger.name or ""))
    version = numbering._get_next_version()
    while True:
        try:
            (home / f"version_{version}").mkdir(parents=True)
        except FileExistsError:
            version += 1
        except OSError as error:
            raise ValueError(
                f"logger: its folder must be one that can be made, got {home} ({error.strerror}); choose another"
            ) from error
        else:
            numbering._version = version
            return


#: A typo must not start a million processes.
LARGEST = {"devices": 1024, "num_nodes": 65_536}

_YAML = bounded(get_loader("yaml"))
_CONFIG_FLAGS = ("--config", "-c")
set_loader("moe_lightning", lambda text: expand_config(_YAML(text)), exceptions=(yaml.YAMLError,))
WatchedDDPStrategy.register_strategies(StrategyRegistry)


class MoECLI(LightningCLI):
    """`train.py fit|validate|test|predict`.

    A checkpoint given by `--ckpt_path` brings the model and data sections it was trained with; see `Resume`.
    """

    _resume: Resume | None = None

    def __init__(self, args: list[str] | None = None, **kwargs: Any) -> None:
        show_help(sys.argv[1:] if args is None else args)
        watch_agent()
        hide_framework_messages()
        super().__init__(
            LanguageModule,
            TextDataModule,
            subclass_mode_model=True,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "use_distributed_sampler": False,  # the loader shares batches out itself, resumably
                "callbacks": [
                    *(LogGuard(), ExactResume(), RouterGuard(), GenerationPrinter(), GracefulStop()),
                    TensorBoardLayout(),
                ],
            },
            parser_class=CommandParser,
            args=args,
            **kwargs,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """YAML with short names; errors are raised, for `train.py` to show in one line."""
        parser = super().init_parser(**kwargs)
        parser.parser_mode = "moe_lightning"
        parser.exit_on_error = False
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that a configuration can tune, and the vocabulary that data hands to the model."""
        parser.add_lightning_class_args(RouterTiming, "router_timing")
        parser.add_lightning_class_args(ExpertLoadMonitor, "expert_load")
        parser.add_lightning_class_args(ExchangeTiming, "exchange_timing")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Trace, "trace")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(OnnxExport, "onnx_export")
        parser.add_lightning_class_args(ProgressBar, "progress_bar")
        parser.add_lightning_class_args(ModelSummary, "model_summary")
        parser.add_lightning_class_args(RunSummary, "run_summary")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "step={step}-val_loss={val/loss:.3f}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "onnx_export.enabled": False,
                "progress_bar.leave": False,
                "model_summary.max_depth": 3,
            }
        )
        parser.link_arguments(
            "data.vocab_size", "model.init_args.vocab_size", compute_fn=_padded_vocab, apply_on="instantiate"
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Expand names, and put a checkpoint's own configuration in place of those sections of the files."""
        given = expand_arguments(list(sys.argv[1:] if args is None else args))
        files = [_read_config(text) for text in _values(given, *_CONFIG_FLAGS)]
        command = next((argument for argument in given if argument in self.subcommands()), "")
        sections = [content["checkpoint"] for content in files if isinstance(content.get("checkpoint"), dict)]
        folders = [section.get("dirpath") for section in sections] + _values(given, "--checkpoint.dirpath")
        paths = [content.get("ckpt_path") for content in files] + _values(given, "--ckpt_path")
        path = checkpoint_path(_last(paths), _last(folders))
        resume = Resume(command, path) if command and path is not None else None
        if resume is None or not resume.stored:
            self.config = parser.parse_args(given)
            return
        given = _replace_configs(given, resume)
        stored = f"--config={yaml.safe_dump(resume.stored)}"
        given.insert(given.index(command) + 1, stored)
        self.config, self._resume = parser.parse_args(given), resume
        saved = parser.parse_args([command, stored])
        resume.check(self._sections(command, saved), self._sections(command, self.config))

    def _sections(self, command: str, config: Any) -> dict[str, Any]:
        """A parsed configuration as plain types."""
        return yaml.safe_load(self._parser(command).dump(config[command], skip_unset=False))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Checkpoints go through `VerifiedCheckpointIO` unless the configuration brings a CheckpointIO of its own."""
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(VerifiedCheckpointIO())
        try:
            return super().instantiate_trainer(plugins=plugins, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ValueError(f"trainer: settings must fit this machine, got: {_one_line(error)}") from error

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Choose a precision where none is given; leave out callbacks that Lightning's own switches turn off."""
        for name, largest in LARGEST.items():
            value = config.get(name)
            if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
                check_int("trainer", name, int(value), -1, largest)
        if config.get("precision") is None:
            config["precision"] = default_precision(str(config.get("accelerator")))
        unwanted: tuple[type[Callback], ...] = ()
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            unwanted += (Checkpoint,)
        if config.get("enable_progress_bar") is False:
            unwanted += (ProgressBar,)
        if config.get("enable_model_summary") is False:
            unwanted += (ModelSummary,)
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, unwanted)])

    @override
    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"config: seed_everything must be a seed, got: {_one_line(error)}") from error

    @override
    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`, where flags can still override it."""

    def before_fit(self) -> None:
        """Checkpoints and logs of runs that start together go to folders of their own."""
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                claim_run_folder(logger)

    @override
    def after_instantiate_classes(self) -> None:
        """Hold the ranks that there are against the checkpoint's place in the data."""
        if self._resume is not None:
            self._resume.check_batch_size(self.datamodule.batch_size, self.trainer.world_size)


class SaveConfig(SaveConfigCallback):
    """Also next to the event files, where another logger than TensorBoard's is the first."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On rank zero, after Lightning's own."""
        for logger in tensorboard_loggers(trainer):
            path = Path(logger.log_dir, self.config_filename)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self.parser.save(self.config, path, skip_unset=False, multifile=self.multifile)


def default_precision(accelerator: str) -> str:
    """bf16-mixed on GPUs that compute in bf16, for that is what people train in there; else 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if not (on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)):
        return "32-true"
    rank_zero_info("precision: bf16-mixed, the default on a GPU; --trainer.precision 32-true for fp32")
    return "bf16-mixed"


def _values(arguments: list[str], *flags: str) -> list[str]:
    """Values of a flag, given as `--flag value` or `--flag=value`."""
    values = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            values.append(value if equals else following)
    return values


def _last(values: list[Any]) -> Any:
    """The last one that was given."""
    return next((value for value in reversed(values) if value is not None), None)


def _read_config(text: str) -> dict[str, Any]:
    """A configuration given as a file or as YAML, expanded; empty where it is the parser's to refuse.

    Raises:
        ValueError: a file that cannot be read; the parser would not name it.
    """
    path = Path(text)
    try:
        config = expand_config(_YAML(path.read_text(encoding="utf-8") if _is_file(path) else text))
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} must be UTF-8 text, got {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} must be YAML, got {_one_line(error)}") from error
    return config if isinstance(config, dict) else {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # YAML, too long for a name
        return False


def _replace_configs(arguments: list[str], resume: Resume) -> list[str]:
    """Arguments whose configuration files lack the checkpoint's sections."""
    replaced: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag not in _CONFIG_FLAGS:
            replaced.append(argument)
            continue
        text = value if equals else next(remaining, "")
        content = _read_config(text)
        own = resume.without_stored(content)
        replaced.append(f"--config={text if own == content else yaml.safe_dump(own)}")
    return replaced


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _padded_vocab(vocab_size: int) -> int:
    """The next multiple of 64, which matrix units want; the ids after the tokenizer's are never a target."""
    return -(-vocab_size // 64) * 64
