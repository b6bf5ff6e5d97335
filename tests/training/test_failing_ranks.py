"""What ends ranks whose launcher is gone, and how soon NCCL's watchdog ends a process."""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import pytest

from moe_lightning.training.strategy.failing_ranks import Guard, shorten_dump


@pytest.mark.parametrize(("seconds", "milliseconds"), [(10, "1000"), (30, "3000"), (1800, "15000")])
def test_the_record_of_what_hangs_takes_no_longer_than_half_the_time_out(seconds, milliseconds, monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", raising=False)
    shorten_dump(timedelta(seconds=seconds))
    assert os.environ.pop("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC") == milliseconds


def test_a_users_own_choice_stays(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "7")
    shorten_dump(timedelta(seconds=10))
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "7"


class Launcher:
    """Like Lightning's: with the processes that it has started."""

    def __init__(self, *procs):
        self.procs = list(procs)


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no descriptors of processes")
@pytest.mark.parametrize("letting_go", [False, True])
def test_a_stopped_rank_ends_with_its_launcher_unless_that_has_let_go(letting_go):
    said, says = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            rank = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rank.send_signal(signal.SIGSTOP)
            guard = Guard(Launcher(rank))
            if letting_go:
                guard.let_go()
            os.write(says, rank.pid.to_bytes(4, "little"))
            signal.pause()
        finally:
            os._exit(1)
    rank = os.pidfd_open(int.from_bytes(os.read(said, 4), "little"))
    try:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        ended = bool(select.select([rank], [], [], 1 if letting_go else 30)[0])
        assert ended is not letting_go
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank, signal.SIGKILL)
        for end in (said, says, rank):
            os.close(end)


def test_no_guard_where_no_ranks_were_started():
    guard = Guard(Launcher())
    assert guard._process is None
    guard.let_go()
