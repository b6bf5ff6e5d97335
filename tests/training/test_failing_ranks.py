"""What ends ranks whose launcher is gone, and how soon NCCL's watchdog ends a process."""

import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import pytest

from moe_lightning.training.strategy import failing_ranks
from moe_lightning.training.strategy.failing_ranks import (
    end_started_ranks,
    set_dump_timeout,
    watch_agent,
    watch_rank_zero,
)
from moe_lightning.utils.errors import explain

linux = pytest.mark.skipif(sys.platform != "linux", reason="the system has no descriptors of processes")


@pytest.mark.parametrize(("seconds", "milliseconds"), [(10, "1000"), (30, "3000"), (1800, "15000")])
def test_the_record_of_what_hangs_takes_no_longer_than_half_the_time_out(seconds, milliseconds, monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", raising=False)
    set_dump_timeout(timedelta(seconds=seconds))
    assert os.environ.pop("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC") == milliseconds


def test_a_users_own_choice_stays(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "7")
    set_dump_timeout(timedelta(seconds=10))
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "7"


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3514",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:1: Connection reset by peer",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_lost_another_says_so_in_one_line(message):
    assert re.fullmatch(
        r"ranks: all must go on to the end, got '[\w ]+' from another; .*", explain(RuntimeError(message))
    )
    assert explain(RuntimeError("Timed out waiting 8000ms for recv operation to complete")) is None
    assert explain(ValueError(message)) is None


class Launcher:
    """Like Lightning's: with the processes that it has started."""

    def __init__(self, *procs):
        self.procs = list(procs)


def forked(work) -> int:
    """Process id of a fork that does it, and then waits for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid


class Told:
    """A pipe by which a fork tells of itself."""

    def __init__(self):
        self.reads, self.writes = os.pipe()

    def say(self, text: str) -> None:
        os.write(self.writes, f"{text}\n".encode())

    def line(self) -> str:
        return b"".join(iter(lambda: os.read(self.reads, 1), b"\n")).decode()


@pytest.fixture
def told():
    told = Told()
    yield told
    os.close(told.reads)
    os.close(told.writes)


@pytest.fixture
def gone():
    """`gone(pid, seconds)`: whether the process ends by then; none is left after."""
    descriptors = []

    def gone(pid: int, seconds: float = 30) -> bool:
        descriptors.append(os.pidfd_open(pid))
        return bool(select.select(descriptors[-1:], [], [], seconds)[0])

    yield gone
    for descriptor in descriptors:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)


@linux
@pytest.mark.parametrize("letting_go", [False, True])
def test_a_stopped_rank_ends_with_its_launcher_unless_that_has_let_go(letting_go, told, gone):
    def launch():
        rank = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rank.send_signal(signal.SIGSTOP)
        guard = watch_rank_zero(Launcher(rank))
        if letting_go:
            guard.release()
        told.say(str(rank.pid))

    launcher = forked(launch)
    rank = int(told.line())
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert gone(rank, 1 if letting_go else 30) is not letting_go


@linux
@pytest.mark.parametrize("deaf", [False, True])
def test_ranks_end_with_the_agent_of_torchrun_that_is_killed(deaf, told, gone, monkeypatch, capfd):
    """By SIGTERM, with which they save a checkpoint; one that is stopped is killed."""
    monkeypatch.setattr(failing_ranks, "PATIENCE_SECONDS", 1 if deaf else 600)

    def terminated(*_):
        told.say("terminated")
        os._exit(143)

    def work():
        os.environ["TORCHELASTIC_RUN_ID"] = "run"
        signal.signal(signal.SIGTERM, terminated)
        watch_agent()
        told.say(str(os.getpid()))
        if deaf:
            os.kill(os.getpid(), signal.SIGSTOP)

    agent = forked(lambda: forked(work))
    rank = int(told.line())
    assert not gone(rank, 0)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    assert gone(rank)
    if not deaf:
        assert told.line() == "terminated"
    assert capfd.readouterr().err == f"strategy: process {agent} is gone, which started this rank: the rank ends\n"


@linux
def test_a_guard_ends_with_its_rank_while_the_agent_goes_on(told, gone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")

    def work():
        told.say(str(watch_agent()._process.pid))
        os._exit(0)

    rank = forked(work)  # this process is the agent
    guard = int(told.line())
    os.waitpid(rank, 0)
    assert gone(guard)


def test_no_guard_where_no_ranks_were_started_and_none_without_torchrun(monkeypatch):
    guard = watch_rank_zero(Launcher())
    assert guard._process is None
    guard.release()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert watch_agent() is None


class Rank(subprocess.Popen):
    """One that has started, and how long it was waited for."""

    def __init__(self, stopped: bool):
        super().__init__(["sleep", "600"])
        self.patience: list[float] = []
        if stopped:
            self.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def wait(self, timeout=None):
        if timeout is not None:
            self.patience.append(timeout)
        return super().wait(timeout and timeout / 1e4)


@linux
def test_a_rank_that_failed_waits_for_those_it_started_together_and_for_a_stopped_one_not_at_all():
    ranks = [Rank(stopped=False), Rank(stopped=True), Rank(stopped=False)]
    launcher = Launcher(*ranks)
    end_started_ranks(launcher)
    assert launcher.procs == []
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 3
    [first], [second], [third] = (rank.patience for rank in ranks)
    assert second == 0
    assert 0 <= third < first <= 8
