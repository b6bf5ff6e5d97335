"""`rank_watchdog.py WATCHED PATIENCE RANK...`: end the ranks once the process that started them is gone.

They get SIGTERM, and SIGKILL if they are still there after PATIENCE seconds; with a PATIENCE of 0 SIGKILL at once.

A program of its own, since a rank may be stopped or wait in a kernel, and the watched process be killed. It ends by
itself once no rank is left, or at a byte on its standard input. Nothing but the standard library: it starts at once.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress


def main(watched: int, patience: int, *ranks: int) -> None:
    """Of process ids. By descriptors, so that no later process of the same id is meant."""
    guarded = []
    for rank in ranks:
        with suppress(ProcessLookupError):
            guarded.append(os.pidfd_open(rank))
    with suppress(ProcessLookupError):  # gone already
        if not _wait_for_end(os.pidfd_open(watched), guarded):
            return
    if patience:
        with suppress(OSError):
            os.write(2, f"strategy: process {watched} is gone, which started this rank: the rank ends\n".encode())
        _send(guarded, signal.SIGTERM)
        _wait_until_none_is_left(guarded, patience)
    _send(guarded, signal.SIGKILL)


def _wait_for_end(watched: int, guarded: list[int]) -> bool:
    """Whether the watched process has ended; False: no rank is left, or none is to be ended."""
    left, stdin = list(guarded), sys.stdin.fileno()
    waiting = [watched, stdin]
    while left:
        ready = select.select(waiting + left, [], [])[0]
        if stdin in ready:
            if os.read(stdin, 1):
                return False
            waiting.remove(stdin)  # the other end is closed
        left = [rank for rank in left if rank not in ready]
        if watched in ready:
            return True
    return False


def _wait_until_none_is_left(guarded: list[int], seconds: float) -> None:
    left, end = list(guarded), time.monotonic() + seconds
    while left and (ready := select.select(left, [], [], max(0, end - time.monotonic()))[0]):
        left = [rank for rank in left if rank not in ready]


def _send(guarded: list[int], number: signal.Signals) -> None:
    for rank in guarded:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank, number)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
