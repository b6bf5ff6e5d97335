"""Rows that cross, to the one rank there is, and come home: values, gradients, and where both stand."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lightning.expert_parallel.crossing import Home, arrive, come_home, cut, depart, turn_back
from moe_lightning.expert_parallel.exchange import Exchange, Moment, Transfer

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


def there_and_back(x_ND, places, group, watch=None):
    """As a dispatcher does it, with the square for the experts."""
    slots = x_ND.shape[0]
    home, rows = Home(SEGMENTS, slots), cut(x_ND, SEGMENTS)
    counts = enumerate(SEGMENTS[::2])
    ways = [Exchange(group, [n], [n], lambda name, i=i: Transfer(f"{name} {i}", watch, beside=True)) for i, n in counts]
    parts, back = [], [way.reverse() for way in ways]
    travelling = depart(rows[0], ways[0])
    for i, way in enumerate(ways):
        pending = travelling
        if i + 1 < len(ways):
            travelling = depart(rows[2 * i + 2], ways[i + 1])
        here = arrive(pending, rows[2 * i + 1], places[i], way, home, i)
        parts += turn_back(here.square(), places[i], back[i], home, i)
    return come_home(parts, back, slots), parts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("behind", [0, 3])
def test_rows_and_gradients_come_home_without_a_copy(behind, device, group_of_one):
    x_ND = torch.randn(sum(SEGMENTS) + behind, WIDTH, device=device, requires_grad=True)
    counts = [sum(SEGMENTS[i : i + 2]) for i in (0, 2, 4)]
    places = [torch.randperm(n, device=device).int() for n in counts]
    there_and_back(x_ND, places, group_of_one)  # NCCL sets up
    grad_ND = torch.randn_like(x_ND)
    with Brought() as brought:
        y_ND, parts = there_and_back(x_ND, places, group_of_one)
        once = torch.autograd.grad(y_ND, x_ND, grad_ND, retain_graph=True)[0]
        again = torch.autograd.grad(y_ND, x_ND, 3 * grad_ND)[0]  # leaves the first in peace
    assert brought.count == 0
    assert y_ND.data_ptr() == parts[0].data_ptr()
    slots = sum(SEGMENTS)
    torch.testing.assert_close(y_ND[:slots], x_ND[:slots].square())
    for got, factor in ((once, 2), (again, 6)):
        assert got.shape == x_ND.shape
        torch.testing.assert_close(got[:slots], (factor * x_ND * grad_ND)[:slots])


def test_each_transfer_is_begun_and_awaited_once_and_backward_mirrors_forward(group_of_one):
    x_ND = torch.randn(sum(SEGMENTS), WIDTH, requires_grad=True)
    places = [torch.randperm(sum(SEGMENTS[i : i + 2])).int() for i in (0, 2, 4)]
    seen = []
    y_ND, _ = there_and_back(x_ND, places, group_of_one, lambda transfer, moment: seen.append((transfer.name, moment)))
    y_ND.sum().backward()
    order = [f"{name} {moment.name}" for name, moment in seen if moment is not Moment.WAIT]
    assert order == [
        "dispatch/forward 0 BEGIN",
        "dispatch/forward 1 BEGIN",
        "dispatch/forward 0 END",
        "combine/forward 0 BEGIN",
        "dispatch/forward 2 BEGIN",
        "dispatch/forward 1 END",
        "combine/forward 1 BEGIN",
        "dispatch/forward 2 END",
        "combine/forward 2 BEGIN",
        *(f"combine/forward {i} END" for i in range(3)),
        *(f"combine/backward {i} BEGIN" for i in (2, 1, 0)),
        "combine/backward 2 END",
        "dispatch/backward 2 BEGIN",
        "combine/backward 1 END",
        "dispatch/backward 1 BEGIN",
        "dispatch/backward 2 END",
        "combine/backward 0 END",
        "dispatch/backward 0 BEGIN",
        "dispatch/backward 1 END",
        "dispatch/backward 0 END",
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_transfer_with_nothing_beside_it_is_waited_for_from_its_beginning(device, group_of_one):
    seen = []
    way = Exchange(
        group_of_one,
        [3],
        [3],
        lambda name: Transfer(name, lambda transfer, moment: seen.append((moment, transfer.work))),
    )
    rows = torch.randn(3, WIDTH, device=device)
    way.begin(rows)
    assert seen == [(moment, None) for moment in Moment]
    assert torch.equal(way.end(), rows)
    assert len(seen) == len(Moment)
