"""The help of `train.py`: its usage, one screen of help, and all flags of a command, a model or a router."""

from __future__ import annotations

import sys
import textwrap
from argparse import SUPPRESS
from collections.abc import Callable, Iterable
from copy import copy
from pydoc import locate
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from moe_lightning.routers import ROUTERS
from moe_lightning.training.config import MODELS, PROMPT_FLAGS, class_path, model_class, router_class
from moe_lightning.training.optimizer import OptimizerConfig

USAGE = """\
usage: python train.py fit|validate|test|predict [--config FILE] [--FLAG VALUE ...]
       python train.py --help
"""


def _names(names: Iterable[str], indent: int) -> str:
    """In lines of 120, the first of which has begun."""
    return textwrap.fill(", ".join(names), 120 - indent).replace("\n", "\n" + " " * indent)


OVERVIEW = f"""\
usage: python train.py COMMAND [--config FILE] [--FLAG VALUE ...]

Train and evaluate Mixture-of-Experts language models with a router you choose.

commands
  fit         train; writes checkpoints, logs and a summary under runs/ or lightning_logs/
  validate    loss and perplexity on the validation split
  test        the same on the test split
  predict     continue prompts

flags most used
  --config FILE             YAML of flags; several are read in order, later ones and flags win
  --ckpt_path FILE          resume it (fit), or evaluate it; brings its model and data settings
  --model NAME              {", ".join(MODELS)}
  --model.router NAME       {_names(ROUTERS, 28)}
  --model.optimizer.learning_rate LR
  --data.path PATH          a text file, a folder or a glob; left out: Python's standard library
  --data.batch_size N       sequences per step and device; --data.seq_len N tokens each
  --data.prompt TEXT        what predict continues; repeat it for several
  --trainer.max_steps N     --trainer.max_time 00:08:00:00 stops after eight hours
  --trainer.devices N       GPUs; --trainer.strategy ddp_ep spreads the experts over them

examples
  python train.py fit --config configs/quickstart.yaml
  python train.py fit --config configs/quickstart.yaml --model.router sinkhorn --data.path "my_texts/*.txt"
  python train.py test --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
  python train.py predict --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt --data.prompt "def main("

more
  python train.py fit --help                     every flag
  python train.py fit --model.help NAME          those of a model; --model.router.help NAME of a router
  python train.py fit --config FILE --print_config    every value that a run would take
"""

#: Flags that print the arguments of a class: where those go, the class of a name, the default, what the run fills in.
_CLASS_HELP: dict[str, tuple[str, Callable[[str], type], type, set[str | int]]] = {
    "--model.help": ("model", model_class, MODELS["decoder_moe"], {"vocab_size"}),
    "--model.router.help": ("model.router", router_class, ROUTERS["fused_select"], {3}),
}


def show_help(arguments: list[str]) -> None:
    """Print the help that `arguments` ask for and exit; return where they ask for none, or for a command's.

    Raises:
        ValueError: there is no such model or router.
        SystemExit: 0, or 2 if there are no arguments.
    """
    if not arguments:
        sys.stderr.write(USAGE)
        raise SystemExit(2)
    if arguments[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW)
        raise SystemExit(0)
    before = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.partition("=")
        if flag in _CLASS_HELP and before not in PROMPT_FLAGS:
            key, find, default, filled_in = _CLASS_HELP[flag]
            name = value or (following if not following.startswith("-") else "")
            sys.stdout.write(class_help(_class(flag, name, find) if name else default, key, filled_in))
            raise SystemExit(0)
        before = argument


def class_help(kind: type, key: str, skip: set[str | int] | None = None, description: str = "") -> str:
    """The arguments of a class as flags that begin with `key`, without those in `skip` (names or a number)."""
    parser = LightningArgumentParser(usage=SUPPRESS, add_help=False, description=description)
    parser.add_class_arguments(kind, key, skip=skip)
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest != key]  # a file of them all
    return parser.format_help()


def _class(flag: str, name: str, find: Callable[[str], type]) -> type:
    kind = locate(class_path(name, find))
    if not isinstance(kind, type):
        raise ValueError(f"config: {flag} must name a class, got {name}; see train.py --help")
    return kind


class CommandParser(LightningArgumentParser):
    """The parser of a command: its help lists the model's own arguments too, and Lightning's, the most, last."""

    @override
    def format_help(self, *args: Any) -> str:
        """The text in another order, without the usage's hundred lines."""
        groups = {action.dest: group for group in self._action_groups for action in group._group_actions}
        if "model" not in groups:
            return super().format_help(*args)
        sections = [group for group in self._action_groups if group is not groups["trainer"]]
        behind_model = sections.index(groups["model"]) + 1
        return "\n".join(
            [
                self._text(sections[:behind_model], "%(prog)s [--config FILE] [--FLAG VALUE ...]", self.description),
                *self._model_help(),
                self._text([*sections[behind_model:], groups["trainer"]], SUPPRESS, None),
            ]
        )

    def _text(self, groups: list[Any], usage: str, description: str | None) -> str:
        part = copy(self)
        part.usage, part.description, part._action_groups = usage, description, groups
        return super(CommandParser, part).format_help()

    def _model_help(self) -> list[str]:
        key, _, default, filled_in = _CLASS_HELP["--model.help"]
        router_key, _, router, router_filled_in = _CLASS_HELP["--model.router.help"]
        return [
            class_help(default, key, filled_in, "With --model decoder_moe; another model's: --model.help NAME."),
            class_help(OptimizerConfig, "model.optimizer"),
            class_help(
                router, router_key, router_filled_in, "With any router; what one adds: --model.router.help NAME."
            ),
        ]
