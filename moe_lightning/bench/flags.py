"""Flags that the benchmarks of layers share, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from moe_lightning.bench.record import check_record_path
from moe_lightning.bench.settings import DTYPES, Settings, check_device, check_settings, check_strategies
from moe_lightning.callbacks.step_trace import FOLDER, make_folder
from moe_lightning.utils.checks import check_choice


class _RecordPath(argparse.Action):
    """Refuses a path that no record may be written to before anything is measured."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        check_record_path(parser.component, values)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Errors in one line, as all others of the project."""

    def __init__(self, command: str, description: str | None, **kwargs: Any) -> None:
        self.component = f"bench.{command}"
        prog = f"python -m moe_lightning.bench {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """For `bench.__main__` to print."""
        raise ValueError(f"{self.component}: {message}; see --help")

    def add_device(self) -> None:
        """--device."""
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=usual, help="cuda or cpu")

    def add_routers(self, strategies: Iterable[str], usual: str, usual_dtype: str) -> None:
        """Device, dtype, which routers and how they are set."""
        self.add_device()
        self.add_argument("--dtype", help=f"fp16, bf16 or fp32; default {usual_dtype} on cuda, fp32 on the CPU")
        self.add_argument("--strategy", nargs="+", default=[usual], help=", ".join(strategies))
        self.add_argument("--all_strategies", action="store_true")
        self.add_argument("--sinkhorn_iters", type=int, default=10)
        self.add_argument("--sinkhorn_temperature", type=float, default=1.0)
        self.add_argument("--skew_experts", type=int, default=0, help="this many experts get --skew_bias")
        self.add_argument("--skew_bias", type=float, default=2.0, help="in logits")
        self.set_defaults(strategies=tuple(strategies), usual_dtype=usual_dtype)

    def add_record(self) -> None:
        """--json."""
        self.add_argument("--json", action=_RecordPath, metavar="FILE", help="write the results as a record")

    def add_results(self, rounds: int) -> None:
        """How often to measure, and where results go."""
        text = "turns that each call takes; medians are over these"
        self.add_argument("--rounds", type=int, default=rounds, help=text)
        self.add_record()
        self.add_argument("--plot", metavar="FILE", help="draw them (.png, .svg, .pdf)")

    def add_trace(self) -> None:
        """--trace."""
        text = f"trace a few calls of every layer too, by torch.profiler; into {FOLDER} unless DIR is given"
        self.add_argument("--trace", nargs="?", const=FOLDER, metavar="DIR", help=text)

    def settings(self, flags: argparse.Namespace, backward: bool) -> Settings:
        """Checked; the flags get the dtype they did not have, and lose what is not the user's."""
        check_device(self.component, flags.device)
        flags.dtype = flags.dtype or (flags.usual_dtype if flags.device == "cuda" else "fp32")
        check_choice(self.component, "dtype", flags.dtype, DTYPES)
        strategies = flags.strategies if flags.all_strategies else tuple(dict.fromkeys(flags.strategy))
        del flags.strategies, flags.usual_dtype
        check_strategies(self.component, strategies, flags.device)
        settings = Settings(
            device=torch.device(flags.device, 0) if flags.device == "cuda" else torch.device("cpu"),
            dtype=DTYPES[flags.dtype],
            strategies=strategies,
            backward=backward,
            sinkhorn_iters=flags.sinkhorn_iters,
            sinkhorn_temperature=flags.sinkhorn_temperature,
            skew_experts=flags.skew_experts,
            skew_bias=flags.skew_bias,
            rounds=flags.rounds,
        )
        check_settings(self.component, settings)
        if vars(flags).get("trace"):
            make_folder(flags.trace)  # before anything is measured
        return settings
