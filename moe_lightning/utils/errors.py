"""Errors that a user can fix are shown in one line; all others keep their traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_lightning.utils.console import print_anywhere
from moe_lightning.utils.memory import ADVICE, gigabytes, host_memory

#: `component: rule, got values, what to do`
_PLAIN = re.compile(r"^[a-z][\w.]*( [\w.]+)?: \S")
_OWN_LINE = re.compile(r"^[a-z][\w.]*: .*\bgot\b")
_KEY = re.compile(r'Parser key "([\w.]+)"')
_UNKNOWN = re.compile(
    r"Option '([\w.]+)' is not accepted|does not accept option '([\w.]+)'|(?i:unrecognized arguments:) (.*)"
)
_WRONG_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|\"?([^.\n]+?)\"?)\. Got value: (.*)")
_EXPECTED = re.compile(r"Expected an? <class '([\w.]+)'>")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_GIVEN = re.compile(r"(?:Given|Got) value: (?:NestedArg\(key='[\w.]+', val='(.*)'\)|(.*))")
_IMPORT = re.compile(
    r"(No module named '[\w.]+'|module '[\w.]+' has no attribute '\w+'"
    r"|'[\w.]+' to be a (?:subclass of|function that returns) <class '\w+'>)"
)
_MISSING = re.compile(r"class_path '([\w.]+)':\s+[^\n]*HINT: Try running `([^`]+)`")
#: Messages of torch, CUDA and numpy where memory ends.
_HOST_IS_FULL = re.compile(r"DefaultCPUAllocator: (can't|not enough memory)")
_DEVICE_IS_FULL = re.compile(r"CUDA error: out of memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_TRIED = re.compile(r"(?:Tried|Unable|tried) to allocate (?:([\d.]+ [KMGTPE]i?B)|(\d+) bytes)")
_DEVICE = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
#: What gloo, NCCL and the store of a process group say where another rank is gone.
_PEER_IS_GONE = re.compile(
    r"Connection (?:closed|reset|refused) by peer|Connection reset|Connection was likely closed|Broken pipe"
    r"|remote process exited|Socket closed"
)
#: What a shell reports of a process that Ctrl-C ended.
_INTERRUPTED = 128 + signal.SIGINT


class ContextLostError(RuntimeError):
    """A kernel has ended this process's CUDA context, for the reason in the text: the GPU is of no more use to it."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error of the project's own style, or of the argument parser, in one line and exit with 2.

    Ctrl-C, where nothing else has taken it, exits with 130.
    """
    print_anywhere()
    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        if _context_fault(error) is not None:  # all that frees device memory at exit would abort
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's 1, before training began
            raise SystemExit(_INTERRUPTED) from None
        raise


@contextmanager
def annotate_error(operation: str) -> Iterator[None]:
    """Add a line to a collective's error: its own text says neither what it was for nor what to do."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"collective: every rank of a group must come to {operation}, got an error instead; if the other ranks did "
            "come, their logs say what stopped them"
        )
        raise


def explain(error: BaseException) -> str | None:
    """The line to show for an error, or None if it is not meant for a user."""
    for of in (_out_of_memory, _context_fault, _peer_is_gone):
        if (line := of(error)) is not None:
            return line
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        place = "" if error.filename is None else f" at {error.filename}"
        return (
            f"disk: what a run writes must fit there, got {error.strerror}{place}; make room, or choose another folder"
        )
    if type(error).__name__ == "MisconfigurationException" or (isinstance(error, ValueError) and _of_lightning(error)):
        return f"trainer: settings must fit each other, got: {' '.join(str(error).split())[:350]}"
    if not isinstance(error, (ArgumentError, ValueError, TypeError)):
        return None
    text = str(error.message) if isinstance(error, ArgumentError) else str(error)
    if "\n" not in text and _OWN_LINE.match(text):
        return text
    if isinstance(error, ArgumentError) or _KEY.search(text) or "Given value type:" in text:
        return _from_parser(text)
    return text if "\n" not in text and _PLAIN.match(text) else None


def _out_of_memory(error: BaseException) -> str | None:
    """The size requested, the memory there is, and what to turn down; None for another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _DEVICE_IS_FULL.search(text)):
        place, request = "a GPU's memory", _TRIED.search(text)
        device = _DEVICE.search(text)
        there_is = f"{device[3]} of {device[2]} free on GPU {device[1]}" if device else "too little free"
    elif isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or _HOST_IS_FULL.search(text):
        place, request = "memory", _TRIED.search(text)
        there_is = str(host_memory())
    else:
        return None
    size = "more" if request is None else gigabytes(int(request[2])) if request[2] else request[1]
    return f"memory: a run must fit in {place}, got a request for {size} with {there_is}; {ADVICE}"


def _context_fault(error: BaseException) -> str | None:
    """Why one of our kernels ended the CUDA context, which the strategy adds as a note to the first error after it."""
    if isinstance(error, ContextLostError):
        return str(error)
    if isinstance(error, torch.AcceleratorError):
        return next((note for note in getattr(error, "__notes__", []) if _PLAIN.match(note)), None)
    return None


def _peer_is_gone(error: BaseException) -> str | None:
    """What is left to say of a rank that lost another, which has said why: not where it waited for it."""
    if not isinstance(error, RuntimeError) or (lost := _PEER_IS_GONE.search(str(error))) is None:
        return None
    return f"ranks: all must go on to the end, got {lost[0]!r} from another; what that one printed says why it ended"


def _of_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised it, as it does for settings that it finds out of place."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def _from_parser(text: str) -> str:
    """The innermost fact of a parser's nested message, under the full name of the field."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    for line in lines:
        if _OWN_LINE.match(line):
            return line
    field = ".".join(dict.fromkeys(_KEY.findall(text))) or "arguments"
    if match := _UNKNOWN.search(text):
        key = next(group for group in match.groups() if group)
        name = key if field == "arguments" else f"{field}.{key}"
        return f"config: keys must be known, got {name.strip()}; --print_config shows the known ones"
    if match := _MISSING.search(text):
        return f"config: {match[1]} needs a package that is installed, got none; {match[2]}"
    if match := _IMPORT.search(text):
        return f"config: {field} must be a known name or the import path of a fitting class, got {match[1]}"
    if groups := _CHOICES.findall(text):
        choices = ", ".join(dict.fromkeys(choice for group in groups for choice in group.split(", ")))
        return f"config: {field} must be one of {choices}, got {_given(text)}"
    if match := _WRONG_TYPE.search(text):
        return f"config: {field} must be of type {match[1] or match[2]}, got {match[3]}"
    if types := [name for name in _EXPECTED.findall(text) if name != "NoneType"]:
        return f"config: {field} must be of type {types[0]}, got {_given(text)}"
    return f"config: {' '.join(' '.join(lines).split()).rpartition('Errors: ')[2][:300]}"


def _given(text: str) -> str:
    match = _GIVEN.search(text)
    return (match[1] or match[2]) if match else "another value"
