"""`rank_guard.py LAUNCHER RANK...`: kill the ranks once the process that started them is gone, however it ended.

A program of its own, since a rank may be stopped or wait in a kernel, and the launcher be killed. It ends without a
deed at a byte on its standard input. Nothing but the standard library: it starts at once.
"""

import os
import select
import signal
import sys
from contextlib import suppress


def main(launcher: int, *ranks: int) -> None:
    """Of process ids. By descriptors, so that no later process of the same id is meant."""
    guarded = []
    for rank in ranks:
        with suppress(ProcessLookupError):
            guarded.append(os.pidfd_open(rank))
    with suppress(ProcessLookupError):
        ready = select.select([os.pidfd_open(launcher), sys.stdin], [], [])[0]
        if sys.stdin in ready and os.read(sys.stdin.fileno(), 1):
            return
    for rank in guarded:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank, signal.SIGKILL)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
