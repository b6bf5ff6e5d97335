"""What T_comm holds: every exchange of a layer, there and back, and again for backward."""

from types import SimpleNamespace

import pytest
import torch

from moe_lightning.bench.ep import movement


class Recorded:
    """An exchange whose rows come at once; `sent` is the order of all of them."""

    sent: list[tuple[str, int, int]]

    def __init__(self, group, send, receive, name="dispatch"):
        self.group, self.send, self.receive, self.name = group, send, receive, name

    def reverse(self):
        return Recorded(self.group, self.receive, self.send, "combine")

    def begin(self, rows):
        self.sent.append((self.name, rows.shape[0], rows.shape[1]))

    def end(self):
        return torch.zeros(sum(self.receive), 8)


@pytest.mark.parametrize("backward", [False, True])
def test_t_comm_is_dispatch_and_combine_and_both_again_for_backward(backward, monkeypatch):
    Recorded.sent = []
    monkeypatch.setattr(movement, "Exchange", Recorded)
    there = Recorded("group", [0, 3], [0, 5])
    plan = SimpleNamespace(ways=[(there, there.reverse())])
    movement.exchanges(plan, torch.zeros(4, 8), backward)()
    layer = [("dispatch", 3, 8), ("combine", 5, 8)]
    assert Recorded.sent == (layer * 2 if backward else layer)
