"""How the other ranks of a run end when one has failed, is stopped or is gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

#: How long another rank may take to end after this one has failed.
PATIENCE_SECONDS = 8
#: How long NCCL's watchdog gives itself, four times over, to write down what hangs, before it ends the process.
_DUMP = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
_DUMP_MILLISECONDS = 15_000


def shorten_dump(timeout: timedelta) -> None:
    """Let a time-out under NCCL end the process soon after: by torch's default it takes a minute more."""
    os.environ.setdefault(_DUMP, str(min(_DUMP_MILLISECONDS, int(timeout.total_seconds() * 100))))


class Guard:
    """From now on the ranks that a launcher has started end if this process does, though it be killed.

    By a process that waits beside it (`rank_guard`); on Linux alone, elsewhere they wait for the time-out.
    """

    def __init__(self, launcher: Any) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        ranks = _started_ranks(launcher)
        if ranks and sys.platform == "linux":
            pids = (str(pid) for pid in (os.getpid(), *(rank.pid for rank in ranks)))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_guard.py")), *pids],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def let_go(self) -> None:
        """What ranks do from now on is their own."""
        if self._process is not None:
            self._process.communicate(b".")


def leave_ranks() -> None:
    """Give up the NCCL communicators of a rank that failed: to destroy them at exit would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # the error to be shown is the first one
            _abort_process_group()


def end_started_ranks(launcher: Any) -> None:
    """They may wait for this rank for ever: let them say what is wrong, then end them."""
    ranks = _started_ranks(launcher)
    if ranks:
        launcher.procs.clear()  # or Lightning's observer would kill this process as well once a rank has failed
    for process in ranks:
        try:
            process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _started_ranks(launcher: Any) -> list[subprocess.Popen[bytes]]:
    return [process for process in getattr(launcher, "procs", []) if isinstance(process, subprocess.Popen)]
