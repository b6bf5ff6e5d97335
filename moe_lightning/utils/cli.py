"""Flags of the commands that are packages: `python -m moe_lightning.export`, `report`."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Errors in one line, as all others of the project.

    Args:
        component: name of the package, which its errors begin with.
        description: of the command.
    """

    def __init__(self, component: str, description: str) -> None:
        super().__init__(prog=f"python -m moe_lightning.{component}", description=description, allow_abbrev=False)
        self._component = component

    def error(self, message: str) -> NoReturn:
        """For `plain_errors` to print."""
        raise ValueError(f"{self._component}: arguments must be known and complete, got: {message}; see --help")
