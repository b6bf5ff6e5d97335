"""The terminal of a command: any encoding, and without messages of the frameworks that a user can do nothing about."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings

#: How messages of Lightning begin that a user can do nothing about.
_MESSAGES = (
    "💡 Tip: ",
    "Seed set to ",
    "TPU available: ",
    "Trainer already configured with model summary callbacks",
)
#: Warnings about the insides of Lightning, torch and jsonargparse, and about what this project does by design.
_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"The dirpath has changed from ",  # a run has a folder of its own
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    r".* does not have many workers",  # a batch takes microseconds
)
_RANK = re.compile(r"^\[rank: \d+\] ")
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")


def print_anywhere() -> None:
    """Let a terminal that lacks a character show its code (`\\xe9` for é) where it would raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hide_framework_messages() -> None:
    """Drop messages and warnings that a user can do nothing about; all others stay."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _is_of_use not in logger.filters:
            logger.addFilter(_is_of_use)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not _RANK.sub("", str(record.msg)).startswith(_MESSAGES)
