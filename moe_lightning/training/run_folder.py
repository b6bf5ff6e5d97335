"""The folder of a run's logs, which no other run gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


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
