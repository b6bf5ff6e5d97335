"""Rows sent to the one rank there is and back: values, gradients, and where both are in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lightning.expert_parallel.all_to_all_autograd import (
    ReceiveBuffers,
    combine_start,
    combine_wait,
    dispatch_start,
    dispatch_wait,
    split,
)
from moe_lightning.expert_parallel.collectives import AllToAll, CommEvent

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEGMENTS = [3, 2, 0, 4, 5, 0]
"""Of three chunks."""
WIDTH = 5


class Brought(TorchDispatchMode):
    """How often rows were brought together."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Any op."""
        self.count += op.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten.clone)
        return op(*args, **(kwargs or {}))


def there_and_back(x_ND, perms, group, hook=None):
    """As a dispatcher does it, with the square for the experts."""
    slots = x_ND.shape[0]
    buffers, rows = ReceiveBuffers.allocate(SEGMENTS, slots), split(x_ND, SEGMENTS)
    counts = enumerate(SEGMENTS[::2])
    dispatches = [AllToAll(group, [n], [n], f"dispatch {i}", hook, async_op=True) for i, n in counts]
    parts, combines = [], [dispatch.transpose(f"combine {i}") for i, dispatch in enumerate(dispatches)]
    in_flight = dispatch_start(rows[0], dispatches[0])
    for i, dispatch in enumerate(dispatches):
        pending = in_flight
        if i + 1 < len(dispatches):
            in_flight = dispatch_start(rows[2 * i + 2], dispatches[i + 1])
        received = dispatch_wait(pending, rows[2 * i + 1], perms[i], dispatch, buffers, i)
        parts += combine_start(received.square(), perms[i], combines[i], buffers, i)
    return combine_wait(parts, combines, slots), parts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("behind", [0, 3])
def test_rows_and_gradients_come_back_without_a_copy(behind, device, group_of_one):
    x_ND = torch.randn(sum(SEGMENTS) + behind, WIDTH, device=device, requires_grad=True)
    counts = [sum(SEGMENTS[i : i + 2]) for i in (0, 2, 4)]
    perms = [torch.randperm(n, device=device).int() for n in counts]
    there_and_back(x_ND, perms, group_of_one)  # NCCL sets up
    grad_ND = torch.randn_like(x_ND)
    with Brought() as brought:
        y_ND, parts = there_and_back(x_ND, perms, group_of_one)
        once = torch.autograd.grad(y_ND, x_ND, grad_ND, retain_graph=True)[0]
        again = torch.autograd.grad(y_ND, x_ND, 3 * grad_ND)[0]  # leaves the first as it is
    assert brought.count == 0
    assert y_ND.data_ptr() == parts[0].data_ptr()
    slots = sum(SEGMENTS)
    torch.testing.assert_close(y_ND[:slots], x_ND[:slots].square())
    for got, factor in ((once, 2), (again, 6)):
        assert got.shape == x_ND.shape
        torch.testing.assert_close(got[:slots], (factor * x_ND * grad_ND)[:slots])


def test_each_transfer_is_started_and_waited_for_once_and_backward_mirrors_forward(group_of_one):
    x_ND = torch.randn(sum(SEGMENTS), WIDTH, requires_grad=True)
    perms = [torch.randperm(sum(SEGMENTS[i : i + 2])).int() for i in (0, 2, 4)]
    seen = []
    y_ND, _ = there_and_back(x_ND, perms, group_of_one, lambda comm, event: seen.append((comm.name, event)))
    y_ND.sum().backward()
    order = [f"{name} {event.name}" for name, event in seen if event is not CommEvent.WAIT]
    assert order == [
        "dispatch 0/forward START",
        "dispatch 1/forward START",
        "dispatch 0/forward END",
        "combine 0/forward START",
        "dispatch 2/forward START",
        "dispatch 1/forward END",
        "combine 1/forward START",
        "dispatch 2/forward END",
        "combine 2/forward START",
        *(f"combine {i}/forward END" for i in range(3)),
        *(f"combine {i}/backward START" for i in (2, 1, 0)),
        "combine 2/backward END",
        "dispatch 2/backward START",
        "combine 1/backward END",
        "dispatch 1/backward START",
        "dispatch 2/backward END",
        "combine 0/backward END",
        "dispatch 0/backward START",
        "dispatch 1/backward END",
        "dispatch 0/backward END",
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_transfer_that_nothing_overlaps_is_waited_for_from_its_start(device, group_of_one):
    seen = []
    dispatch = AllToAll(group_of_one, [3], [3], hook=lambda comm, event: seen.append((event, comm.work)))
    rows = torch.randn(3, WIDTH, device=device)
    dispatch.start(rows)
    assert seen == [(event, None) for event in CommEvent]
    assert torch.equal(dispatch.wait(), rows)
    assert len(seen) == len(CommEvent)
