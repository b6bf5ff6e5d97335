"""Ranks as forks of a process that has imported all they need: a pair starts in milliseconds."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def fork_ranks(
    work: Callable[[int], None], folder: Path, world: int = 2, timeout_seconds: float = 30, number: int = 0
) -> list[int]:
    """Pids of ranks joined by gloo that do `work(rank)` in `folder`, each with a log of its own.

    Args:
        work: its SystemExit is the rank's end, any other exception is logged and ends it with status 1.
        folder: theirs.
        world: how many.
        timeout_seconds: of a collective.
        number: of this start of ranks in the folder.
    """
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(work, folder, rank, world, timeout_seconds, number)
        pids.append(pid)
    return pids


def statuses(pids: list[int]) -> list[int]:
    """Wait for the ranks: what they ended with; less than zero is a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _rank(work, folder: Path, rank: int, world: int, timeout_seconds: float, number: int) -> None:
    status = 1
    try:
        os.chdir(folder)
        log = os.open(f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # As torchrun would say; Lightning then starts no ranks itself.
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}
        store = dist.FileStore(str(folder / f"store-{number}"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_seconds)
        )
        work(rank)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # as if killed: nothing of the parent's is taken down
