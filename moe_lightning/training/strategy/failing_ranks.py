"""How the other ranks of a run end when one has failed, is stopped or is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from torch.distributed.distributed_c10d import _abort_process_group

#: How long another rank may take to end after this one has failed.
PATIENCE_SECONDS = 8
#: How long NCCL's watchdog gives itself, four times over, to write down what hangs, before it ends the process.
_DUMP = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
_DUMP_MILLISECONDS = 15_000
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def shorten_dump(timeout: timedelta) -> None:
    """Let a time-out under NCCL end the process soon after: by torch's default it takes a minute more."""
    os.environ.setdefault(_DUMP, str(min(_DUMP_MILLISECONDS, int(timeout.total_seconds() * 100))))


def end_with_launcher(environment: ClusterEnvironment | None, together: bool) -> None:
    """Whether this rank, started by rank 0 of its host, is to be killed when that one is gone, however it ended.

    A rank that is stopped, or waits in a kernel, can be ended by the system alone. Linux has it; elsewhere it waits for
    the time-out.
    """
    started = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
    if started and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL if together else 0)


def leave_ranks() -> None:
    """Give up the NCCL communicators of a rank that failed: to destroy them at exit would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        with contextlib.suppress(RuntimeError):  # the error to be shown is the first one
            _abort_process_group()


def end_started_ranks(launcher: Any) -> None:
    """They may wait for this rank for ever: let them say what is wrong, then end them."""
    started = getattr(launcher, "procs", [])
    ranks = [process for process in started if isinstance(process, subprocess.Popen)]
    if ranks:
        started.clear()  # or Lightning's observer would kill this process as well once a rank has failed
    for process in ranks:
        try:
            process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
