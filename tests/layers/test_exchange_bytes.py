"""What an exchange says of itself to a timer."""

import pytest
import torch

from moe_lightning.expert_parallel import exchange


@pytest.mark.parametrize("beside", [False, True])
def test_bytes_are_those_that_arrive_and_not_those_that_leave(beside, monkeypatch):
    monkeypatch.setattr(exchange.dist, "all_to_all_single", lambda *args, **options: None)
    transfer = exchange.Transfer("dispatch/forward", beside=beside)
    transfer.begin(torch.zeros(3, 8), None, [1, 2], [4, 1])
    assert transfer.bytes_received == 5 * 8 * 4
