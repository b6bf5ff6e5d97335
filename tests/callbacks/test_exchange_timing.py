"""Times of an exchange from moments that are set by hand: what is hidden, what is waited for, and what came."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from moe_lightning.callbacks import clocks, exchange_timing
from moe_lightning.expert_parallel.collectives import CommEvent, timed_region


@pytest.mark.parametrize(
    ("on_gpu", "moments", "expected"),
    [  # begin, where on a GPU the transfer has arrived, wait, end
        (True, (0, 5, 4, 6), (5, 2, 3)),  # most of it beside other work
        (True, (0, 5, 7, 7.5), (5, 0.5, 3)),  # there before it was asked for
        (True, (0, 5, 0.5, 6), (5.5, 5.5, 3)),  # all of it waited for: the stream goes on after the arrival
        (False, (0, 4, 6), (6, 2, 3)),
    ],
)
def test_total_and_exposed(on_gpu, moments, expected, monkeypatch):
    to_come = iter(moments)

    class Event:
        in_graph = False

        def record(self):
            self.at = next(to_come)

        def reached(self):
            return True

        def milliseconds_until(self, later):
            return later.at - self.at

    for name in ("CudaEvent", "HostEvent"):
        monkeypatch.setattr(clocks, name, Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    timer = exchange_timing._CommTimer()
    timer.events.batch = 1
    work = SimpleNamespace(wait=lambda: None)
    transfer = SimpleNamespace(name="dispatch/forward", on_gpu=on_gpu, work=work, bytes_received=3e6)
    for event in CommEvent:
        timer(transfer, event)
    assert timer.drain() == [(1, "dispatch/forward", expected)]


def test_gigabytes_per_second_are_of_what_came_over_the_whole_time():
    times = exchange_timing.ExchangeTimes(total_ms=2.0, exposed_ms=1.0, megabytes=3.0)
    assert times.figures() == {"total_ms": 2.0, "exposed_ms": 1.0, "gb_per_s": 1.5}
    assert exchange_timing.ExchangeTimes(0.0, 0.0, 0.0).figures()["gb_per_s"] == 0.0


def test_times_of_a_graph_are_of_the_micro_batch_that_replays_it(monkeypatch):
    class Event(clocks.HostEvent):
        def __init__(self, in_graph=False):
            self.in_graph = in_graph

        def milliseconds_until(self, later):
            return 2.0

    monkeypatch.setattr(clocks, "CudaEvent", Event)
    dispatcher = SimpleNamespace(comm_hook=None)
    timing = exchange_timing.ExchangeTiming(every_n_batches=10)
    timing._dispatchers = [dispatcher]
    pl_module = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: True)),
        _logger_connector=SimpleNamespace(should_update_logs=False),
    )
    with clocks.capture_events() as groups, timing.timing(True):
        for name in ("dispatch/forward", "combine/forward"):
            with timed_region(dispatcher.comm_hook, name, on_gpu=True) as movement:
                movement.received(torch.tensor(5), 200_000, into=(count := torch.zeros((), dtype=torch.int32)))
    assert dispatcher.comm_hook is None
    assert timing.is_idle
    assert len(groups) == 2
    assert all(event.in_graph for group in groups for event in group.events.values())
    for batch in range(4):
        timing.on_train_batch_start(trainer, pl_module, None, batch)
        assert timing.is_timing == (batch == 1)
        if batch in (1, 3):  # a replay that another callback asks for counts too
            count.fill_(5 * batch)
            for timer, key, events in groups:
                timer.close(key, events)
            assert not timing.is_idle
        timing.on_train_batch_end(trainer)
    times = timing.run_times()
    assert times["combine/forward"] == (2.0, 2.0, pytest.approx((1 + 3) / 2))
    assert times["dispatch/forward"].total_ms == 2.0
