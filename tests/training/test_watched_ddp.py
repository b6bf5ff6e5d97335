"""The strategy behind `ddp` and `ddp_ep`: where a run gets it, its time-outs, and errors at the start in one line."""

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from moe_lightning.training.strategy import ExpertParallelStrategy, WatchedDDPStrategy
from moe_lightning.utils.errors import explain


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_ep"])
def test_the_command_lines_ddp_is_the_one_whose_ranks_end_together(strategy, parsed):
    trainer = parsed("--trainer.devices=2", f"--trainer.strategy={strategy}").trainer
    assert isinstance(trainer.strategy, WatchedDDPStrategy)
    assert trainer.strategy._ddp_kwargs == ({"find_unused_parameters": True} if strategy.endswith("true") else {})


@pytest.mark.parametrize("strategy", [WatchedDDPStrategy, ExpertParallelStrategy])
def test_timeouts_are_minutes_for_a_step_and_more_for_the_start_and_for_a_rank_that_writes(strategy):
    strategy = strategy()
    limits = strategy._step_timeout, strategy._start_timeout, strategy._barrier_timeout
    assert [limit.total_seconds() for limit in limits] == [300, 600, 3600]


@pytest.mark.parametrize("name", ["timeout_seconds", "start_timeout_seconds", "barrier_timeout_seconds"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e30])
def test_bad_timeouts(name, seconds):
    with pytest.raises(ValueError, match=rf"^strategy: {name} must be a positive number of seconds, got {name}="):
        ExpertParallelStrategy(**{name: seconds})


@pytest.mark.parametrize(
    "error",
    [
        dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.\nframe #0"),
        dist.DistNetworkError("The server socket has failed to listen, name: EADDRINUSE, message: address in use"),
        dist.DistNetworkError("The client socket has timed out after 600000ms while trying to connect to (a, 7)."),
    ],
)
def test_ranks_that_do_not_come_and_a_taken_port_are_one_line(error, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "7")

    def fails(_):
        raise error

    monkeypatch.setattr(DDPStrategy, "setup_environment", fails)
    with pytest.raises(ValueError, match=r"^strategy: ") as raised:
        WatchedDDPStrategy().setup_environment()
    said = str(error).splitlines()[0].removesuffix(".")
    assert explain(raised.value) == (
        f"strategy: all 1 ranks must join at a:7 within start_timeout_seconds=600, got: {said}; look at the other "
        "ranks' logs, free the port, or raise start_timeout_seconds"
    )
