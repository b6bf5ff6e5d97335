"""DDP whose ranks end together: none waits without end for one that has failed, is stopped, or is of another run."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.distributed_c10d import _set_pg_timeout
from typing_extensions import override

from moe_lightning.training.strategy.failing_ranks import (
    PATIENCE_SECONDS,
    Watchdog,
    abort_process_group,
    end_started_ranks,
    set_dump_timeout,
    watch_agent,
    watch_rank_zero,
)
from moe_lightning.training.strategy.same_run import check_same_run
from moe_lightning.utils.errors import annotate_error


class WatchedDDPStrategy(DDPStrategy):
    """Lightning's DDP with time-outs that fit what is waited for, and ranks that end soon after one of them.

    Args:
        timeout_seconds: how long a collective of training waits for a rank that does not come; NCCL's watchdog takes
            four tenths more, a minute at the most.
        start_timeout_seconds: the same until the end of the first training step: ranks start one after the other,
            compile and choose kernels. Validation, test and prediction alone keep it.
        barrier_timeout_seconds: how long a rank may work alone while the others wait for it in a barrier: it writes a
            checkpoint or exports it. Lightning sets the preparation of data no limit.
        kwargs: of `DDPStrategy`.
    """

    def __init__(
        self,
        timeout_seconds: float = 300,
        start_timeout_seconds: float = 600,
        barrier_timeout_seconds: float = 3600,
        **kwargs: Any,
    ) -> None:
        limits = {
            "timeout_seconds": timeout_seconds,
            "start_timeout_seconds": start_timeout_seconds,
            "barrier_timeout_seconds": barrier_timeout_seconds,
        }
        for name, seconds in limits.items():
            if not 0 < seconds <= timedelta.max.total_seconds():
                raise ValueError(f"strategy: {name} must be a positive number of seconds, got {name}={seconds}")
        super().__init__(timeout=timedelta(seconds=start_timeout_seconds), **kwargs)
        self._step_timeout = timedelta(seconds=timeout_seconds)
        self._barrier_timeout = timedelta(seconds=barrier_timeout_seconds)
        self._barrier_group: dist.ProcessGroup | None = None
        self._batches = 0  # of training, begun
        self._watchdog: Watchdog | None = None  # of a run, where this rank has started others

    @override
    def setup_environment(self) -> None:
        """Join the ranks, which must be of one run.

        Raises:
            ValueError: they did not all come, the port is taken, or one was started with other settings.
        """
        set_dump_timeout(self._step_timeout)
        watch_agent()
        self._watchdog = watch_rank_zero(self.launcher)
        try:
            super().setup_environment()
        except dist.DistError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = str(error).splitlines()[0].removesuffix(".")
            raise ValueError(
                f"strategy: all {self.world_size} ranks must join at {place} within start_timeout_seconds="
                f"{self._start_timeout.total_seconds():g}, got: {reason}; look at the other ranks' logs, free the "
                "port, or raise start_timeout_seconds"
            ) from error
        if self._barrier_group is None and self.world_size > 1:
            # As Lightning waits for data that one rank prepares: under NCCL the watchdog would end the others.
            self._barrier_group = dist.new_group(backend="gloo", timeout=self._barrier_timeout)
        assert self.lightning_module is not None
        check_same_run(self.lightning_module)

    @override
    def setup(self, trainer: L.Trainer) -> None:
        self._batches = 0
        self._set_timeout(self._start_timeout)
        super().setup(trainer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Once the first step is over the ranks keep pace."""
        self._batches += 1
        if self._batches == 2:
            self._set_timeout(self._step_timeout)

    @property
    def _start_timeout(self) -> timedelta:
        assert self._timeout is not None
        return self._timeout

    def _set_timeout(self, timeout: timedelta) -> None:
        """Of all collectives from now on."""
        _set_pg_timeout(timeout)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As in DDP, but a rank may come late."""
        if self._barrier_group is not None:
            with annotate_error(f"the barrier {args[0] if args else kwargs.get('name', '')!r}"):
                dist.monitored_barrier(self._barrier_group, self._barrier_timeout)
        super().barrier(*args, **kwargs)

    @override
    def teardown(self) -> None:
        if not self._context_is_lost():
            super().teardown()
        if self._watchdog is not None:
            self._watchdog.release()
            self._watchdog = None

    def _context_is_lost(self) -> bool:
        """Whether a kernel has ended the CUDA context: then nothing can be moved off the GPU."""
        return False

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Neither this rank nor those that it started may wait for others any more."""
        super().on_exception(exception)
        if not (isinstance(exception, SystemExit) and self._all_ranks_stop()):
            if not self._context_is_lost():  # or the abort would wait for kernels of a context that has none
                abort_process_group()
            self._barrier_group = None
        end_started_ranks(self.launcher)

    def _all_ranks_stop(self) -> bool:
        """Whether they have come here too, as when a run is stopped after a step."""
        if self._barrier_group is None or self.lightning_module is None:
            return False
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return False
        try:  # a monitored barrier would hold all but rank zero for the group's own time-out
            _set_pg_timeout(timedelta(seconds=PATIENCE_SECONDS), self._barrier_group)
            dist.barrier(self._barrier_group)
            _set_pg_timeout(self._barrier_timeout, self._barrier_group)
        except RuntimeError:
            return False
        return True

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """In the place of Lightning's own where that starts scripts."""
        description = "DDP whose ranks end together"
        strategy_registry.register("ddp", cls, description=description, override=True)
        for unused in (True, False):
            strategy_registry.register(
                f"ddp_find_unused_parameters_{str(unused).lower()}",
                cls,
                description=description,
                override=True,
                find_unused_parameters=unused,
            )
