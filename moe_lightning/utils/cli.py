"""The one command-line parser: `python -m moe_lightning.export`, `report`, and each command of `bench`."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from typing_extensions import override

#: Other names of a flag, the original's among them, on every command that has the flag.
ALIASES = {
    "--routers": ("--router", "--strategies", "--strategy"),
    "--router": ("--routers", "--strategies", "--strategy"),
    "--all_routers": ("--all_strategies",),
    "--num_experts": ("--experts", "--moe_n_experts"),
    "--top_k": ("--moe_top_k",),
    "--mlp_hidden_dim": ("--hidden_dim", "--ffn"),
    "--n_layers": ("--layers",),
    "--n_heads": ("--heads",),
    "--baselines": ("--peers",),
    "--extra_dtype": ("--also_dtype",),
    "--extra_skew_experts": ("--also_skew_experts",),
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, as all others of the project.

    Args:
        component: what its errors begin with: the package, and the command where the package has several.
        description: of the command.
        prog: how it is called; by default `python -m moe_lightning.<component>`.
    """

    def __init__(self, component: str, description: str | None, prog: str | None = None) -> None:
        prog = prog or f"python -m moe_lightning.{component}"
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.component = component

    @override
    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """With its aliases."""
        aliases = (alias for name in names for alias in ALIASES.get(name, ()))
        return super().add_argument(*names, *aliases, **options)

    @override
    def error(self, message: str) -> NoReturn:
        """For `plain_errors` to print."""
        raise ValueError(f"{self.component}: arguments must be known and complete, got: {message}; see --help")
