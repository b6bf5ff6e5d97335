"""Rows that cross, to the one rank there is, and come home: values, gradients, and where both stand."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lightning.layers.crossing import Home, arrive, come_home, cut, depart, turn_back
from moe_lightning.layers.exchange import Exchange

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


@pytest.fixture
def group_of_one():
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def there_and_back(x_ND, places, group):
    """As a dispatcher does it, with the square for the experts."""
    slots = x_ND.shape[0]
    home, rows = Home(SEGMENTS, slots), cut(x_ND, SEGMENTS)
    ways = [Exchange(group, [n], [n]) for n in SEGMENTS[::2]]
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
