"""The hook of an MoE layer: each phase once, in order, forward; and in reverse where gradients arrive."""

import pytest
import torch
from moe_reference import make_moe, output_and_gradients

from moe_lightning.layers import Phase, no_hook, with_hook, without_hook
from moe_lightning.routers import ROUTERS


class Recorder:
    """A hook that writes down every arrival."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, phase, tensor=None, step=None):
        self.forward.append(phase)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: self.backward.append(phase))


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("experts", ["loop", "grouped_mm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", list(ROUTERS))
def test_each_phase_once_in_order_and_back(router, training, experts, capacity_factor):
    moe = make_moe(router, experts, capacity_factor=capacity_factor).train(training)
    moe.hook = recorder = Recorder()
    x = torch.randn(4, 5, 16, requires_grad=True)
    y, _ = moe(x)
    assert recorder.forward == list(Phase)
    y.sum().backward()
    assert recorder.backward == [p for p in reversed(Phase) if p is not Phase.PERMUTE]  # no gradient passes there


def test_a_second_pass_calls_again_and_a_pass_without_gradients_calls_forward_only():
    moe = make_moe()
    moe.hook = recorder = Recorder()
    with torch.no_grad():
        moe(torch.randn(5, 16))
        moe(torch.randn(5, 16))
    assert recorder.forward == list(Phase) * 2
    assert recorder.backward == []


def test_the_order_in_backward_holds_in_a_stack_of_layers():
    log = []
    layers = [make_moe() for _ in range(3)]
    for i, layer in enumerate(layers):
        layer.hook = recorder = Recorder()
        recorder.forward = recorder.backward = type(
            "Log", (list,), {"append": lambda self, phase, i=i: log.append((i, phase))}
        )()
    x = torch.randn(7, 16, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y)[0]
    forward = [(i, phase) for i in range(3) for phase in Phase]
    assert log == forward
    log.clear()
    y.sum().backward()
    assert log == [step for step in reversed(forward) if step[1] is not Phase.PERMUTE]


def test_off_is_the_default_and_hooks_change_no_value():
    moe = make_moe()
    assert moe.hook is no_hook
    assert no_hook(Phase.LOGIT, torch.ones(1)) is None
    x_TD, grad_TD = torch.randn(9, 16), torch.randn(9, 16)
    silent = output_and_gradients(moe, x_TD, grad_TD)
    moe.hook = Recorder()
    hooked = output_and_gradients(moe, x_TD, grad_TD)
    assert all(hooked[name].equal(silent[name]) for name in silent)


def test_a_hook_is_no_part_of_the_state():
    moe = make_moe()
    keys = list(moe.state_dict())
    moe.hook = Recorder()
    assert list(moe.state_dict()) == keys == ["router.weight", "experts.up", "experts.down"]


def test_several_hooks_in_one():
    moe = make_moe()
    first, second = Recorder(), Recorder()
    moe.hook = with_hook(moe.hook, first)
    assert moe.hook is first  # alone it is called directly
    moe.hook = with_hook(with_hook(moe.hook, second), second)
    moe(torch.randn(5, 16))
    assert first.forward == second.forward == list(Phase)  # once, however often it was added
    moe.hook = without_hook(moe.hook, first)
    assert moe.hook is second
    assert without_hook(moe.hook, first) is second
    moe.hook = without_hook(moe.hook, second)
    assert moe.hook is no_hook
