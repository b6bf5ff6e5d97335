"""Errors a user can mend are shown in one line; all others keep their traceback."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

#: `component: rule, got values, what to do`
_PLAIN = re.compile(r"^[a-z][\w.]*( [\w.]+)?: \S")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error of the project's own style, or of the argument parser, in one line and exit with 2."""
    try:
        yield
    except (ArgumentError, ValueError, TypeError, FileNotFoundError) as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def explain(error: BaseException) -> str | None:
    """The line to show for an error, or None if it is not meant for a user."""
    if isinstance(error, ArgumentError):
        return _one_line(error)
    text = str(error)
    return text if "\n" not in text and _PLAIN.match(text) else None


def _one_line(error: ArgumentError) -> str:
    """The innermost cause in the project's style if there is one, else the parser's message with line breaks folded."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValueError) and _PLAIN.match(str(cause)) and "\n" not in str(cause):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return "config: " + re.sub(r"\s*\n\s*", " ", str(error.message)).strip()
