"""The clock under the timing callback: CUDA events are asked, never waited for."""

import pytest
import torch
from tiny_fit import MS, Clock

from moe_lightning.callbacks import clocks
from moe_lightning.callbacks.clocks import CudaEvent, HostEvent, PhaseClock, capture_events
from moe_lightning.layers import Phase


class FakeEvent:
    """A CUDA event on a stream that is `reached` so far; waiting for it fails."""

    reached = 0.0
    made = 0

    def __init__(self, enable_timing=False, external=False):
        assert enable_timing
        self.external = external

    def record(self):
        FakeEvent.made += 1
        self.at = float(FakeEvent.made)

    def query(self):
        return self.at <= FakeEvent.reached

    def elapsed_time(self, later):
        assert self.query()
        assert later.query(), "asked for the time of an event that the stream has not reached"
        return later.at - self.at

    def synchronize(self):
        pytest.fail("waited for the GPU")


class OnGpu:
    is_cuda = True
    requires_grad = False


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(FakeEvent, "reached", 0.0)
    monkeypatch.setattr(FakeEvent, "made", 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("waited for the GPU"))
    return FakeEvent


def forward(hook, tensor):
    for phase in Phase:
        hook(phase, None if phase is Phase.PERMUTE else tensor)


def test_cuda_passes_are_handed_out_in_order_once_reached(gpu):
    clock = PhaseClock(2)
    for layer in clock.layers:
        forward(layer, OnGpu())
    assert clock.drain() == []
    gpu.reached = 6
    assert clock.drain() == []  # the last event of layer 0 is event 7
    gpu.reached = 13
    assert [(times.layer, times.direction) for times in clock.drain()] == [(0, "forward")]
    gpu.reached = 14
    (times,) = clock.drain()
    assert times.layer == 1
    assert times.milliseconds == dict.fromkeys(list(Phase)[:-1], 1.0)
    assert clock.drain() == []


def test_a_pass_that_is_not_reached_holds_back_those_after_it(gpu):
    clock = PhaseClock(1)
    forward(clock.layers[0], OnGpu())
    late = clock.timer._groups[0][1][Phase.DONE]
    late.event.at = 100.0
    forward(clock.layers[0], OnGpu())
    gpu.reached = 50
    assert clock.drain() == []
    gpu.reached = 100
    assert len(clock.drain()) == 2


def test_a_phase_without_a_tensor_stays_on_the_device_of_the_last_one(gpu):
    clock = PhaseClock(1)
    assert isinstance(clock.record(None), HostEvent)
    assert isinstance(clock.record(OnGpu()), CudaEvent)
    assert isinstance(clock.record(None), CudaEvent)
    assert isinstance(clock.record(torch.ones(1)), HostEvent)


def test_events_are_used_again_and_keep_their_times(gpu):
    clock = PhaseClock(1)
    made = []
    for i in range(3):
        forward(clock.layers[0], OnGpu())
        made.append({id(event) for event in clock.timer._groups[-1][1].values()})
        gpu.reached = gpu.made
        assert [times.milliseconds[Phase.LOGIT] for times in clock.drain()] == [1.0], i
    assert made[0] == made[1] == made[2]


def test_events_in_flight_are_not_used_again(gpu):
    clock = PhaseClock(1)
    forward(clock.layers[0], OnGpu())
    forward(clock.layers[0], OnGpu())
    first, second = ({id(event) for event in events.values()} for _, events in clock.timer._groups)
    assert not first & second


def test_host_events_are_wall_time(monkeypatch):
    clock = Clock(monkeypatch, clocks)
    first, second = HostEvent(), HostEvent()
    first.record()
    clock.tick(3)
    second.record()
    assert first.reached()
    assert first.milliseconds_until(second) == 3 * MS


@pytest.mark.gpu
def test_real_events_add_up():
    clock = PhaseClock(1)
    x = torch.randn(512, 512, device="cuda", requires_grad=True)
    y = x
    for phase in Phase:
        clock.layers[0](phase, y)
        y = y @ x
    y.sum().backward()
    torch.cuda.synchronize()
    passes = clock.drain()
    assert [times.direction for times in passes] == ["forward", "backward"]
    assert all(value > 0 for times in passes for value in times.milliseconds.values())


def test_events_of_a_captured_pass_are_read_after_each_replay_and_stay_in_the_graph(gpu):
    clock = PhaseClock(1)
    with capture_events() as groups:
        forward(clock.layers[0], OnGpu())
    assert len(clock.timer) == 0
    [(timer, key, events)] = groups
    assert (timer, key) == (clock.timer, (0, "forward"))
    assert all(event.event.external for event in events.values())
    for replay in (1, 2):
        for step, phase in enumerate(Phase):
            events[phase].event.at = 10.0 * replay + step**2
        assert clock.drain() == []
        timer.close(key, events)
        gpu.reached = 10.0 * replay + 35
        assert clock.drain() == []
        gpu.reached = 10.0 * replay + 36
        [times] = clock.drain()
        assert list(times.milliseconds.values()) == [1, 3, 5, 7, 9, 11]
    assert not any(event.event.external for event in [clock.record(OnGpu()) for _ in Phase])
