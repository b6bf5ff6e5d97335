"""How the other ranks of a run end when one has failed, is stopped or is gone, and all when their launcher is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

#: How long another rank may take to end after this one has failed, and this one after its launcher is gone.
PATIENCE_SECONDS = 8
#: How long NCCL's watchdog gives itself, four times over, to write down what hangs, before it ends the process.
_DUMP = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
_DUMP_MILLISECONDS = 15_000


def set_dump_timeout(timeout: timedelta) -> None:
    """Let a time-out under NCCL end the process soon after: by torch's default it takes a minute more."""
    os.environ.setdefault(_DUMP, str(min(_DUMP_MILLISECONDS, int(timeout.total_seconds() * 100))))


class Watchdog:
    """From now on ranks end if the process that started them does, even if it is killed.

    By a process of its own (`rank_watchdog`); on Linux alone, elsewhere they wait for the time-out.

    Args:
        watched: process id of what started them.
        ranks: process ids; with none of them there is nothing to watch.
        patience_seconds: that a rank has to save a checkpoint; 0: none, as it waits for the one that is gone.
    """

    def __init__(self, watched: int, ranks: list[int], patience_seconds: int = 0) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if ranks and sys.platform == "linux":
            numbers = map(str, (watched, patience_seconds, *ranks))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_watchdog.py")), *numbers],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def release(self) -> None:
        """From now on ranks may go on alone."""
        if self._process is not None:
            self._process.communicate(b".")


def watch_agent() -> Watchdog | None:
    """Where torchrun started this rank: end it as SIGTERM does if torchrun's agent is gone, which waits for its ranks.

    One for the life of the process: after a run of all ranks the agent goes last.
    """
    return _agent_watchdog(os.getpid()) if dist.is_torchelastic_launched() else None


@cache
def _agent_watchdog(rank: int) -> Watchdog:
    """By process id: a fork has not the watchdog of its parent."""
    return Watchdog(_agent(), [rank], PATIENCE_SECONDS)


def watch_rank_zero(launcher: Any) -> Watchdog:
    """End the ranks that Lightning's launcher has started from this one if this one is gone."""
    return Watchdog(os.getpid(), [rank.pid for rank in _started_ranks(launcher)])


def _agent() -> int:
    """The nearest process above that was not started as a rank: a script may lie between."""
    pid = os.getppid()
    with contextlib.suppress(OSError):  # no /proc, or another user's process
        while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return pid


def abort_process_group() -> None:
    """Give up the NCCL communicators of a rank that failed: to destroy them at exit would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # the error to be shown is the first one
            _abort_process_group()


def end_started_ranks(launcher: Any) -> None:
    """They may wait for this rank: let them report what is wrong, then end them. A stopped one reports nothing."""
    ranks = _started_ranks(launcher)
    if ranks:
        launcher.procs.clear()  # or Lightning's observer would kill this process as well once a rank has failed
    end = time.monotonic() + PATIENCE_SECONDS
    for process in ranks:
        try:
            process.wait(timeout=0 if _is_stopped(process.pid) else max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "tT"
    return False


def _started_ranks(launcher: Any) -> list[subprocess.Popen[bytes]]:
    return [process for process in getattr(launcher, "procs", []) if isinstance(process, subprocess.Popen)]
