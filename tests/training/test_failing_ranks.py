"""What ends ranks whose launcher is gone, and how soon NCCL's watchdog ends a process."""

import os
import select
import signal
import sys
from datetime import timedelta

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from moe_lightning.training.strategy.failing_ranks import end_with_launcher, shorten_dump


@pytest.mark.parametrize(("seconds", "milliseconds"), [(10, "1000"), (30, "3000"), (1800, "15000")])
def test_the_record_of_what_hangs_takes_no_longer_than_half_the_time_out(seconds, milliseconds, monkeypatch):
    monkeypatch.delenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", raising=False)
    shorten_dump(timedelta(seconds=seconds))
    assert os.environ.pop("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC") == milliseconds


def test_a_users_own_choice_stays(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "7")
    shorten_dump(timedelta(seconds=10))
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends no children with their parent")
@pytest.mark.parametrize(
    ("environment", "rank", "calls", "ends"),
    [
        (LightningEnvironment, "1", [True], True),
        (LightningEnvironment, "1", [True, False], False),
        (LightningEnvironment, "0", [True], False),
        (TorchElasticEnvironment, "1", [True], False),
    ],
)
def test_a_stopped_rank_ends_with_its_launcher_alone(environment, rank, calls, ends, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    said, says = os.pipe()
    hears, told = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        started = os.fork()
        if started == 0:
            for together in calls:
                end_with_launcher(environment(), together)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(started, os.WUNTRACED)  # it has stopped
        os.write(says, started.to_bytes(4, "little"))
        os.read(hears, 1)
        os._exit(0)
    started = os.pidfd_open(int.from_bytes(os.read(said, 4), "little"))
    try:
        os.write(told, b".")
        os.waitpid(launcher, 0)
        assert bool(select.select([started], [], [], 30 if ends else 0.3)[0]) is ends
    finally:
        if not ends:
            signal.pidfd_send_signal(started, signal.SIGKILL)
        for end in (said, says, hears, told, started):
            os.close(end)
