"""The one command-line parser: `python -m moe_lightning.export`, `report`, and each command of `bench`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from typing_extensions import override


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
    def error(self, message: str) -> NoReturn:
        """For `plain_errors` to print."""
        raise ValueError(f"{self.component}: arguments must be known and complete, got: {message}; see --help")
