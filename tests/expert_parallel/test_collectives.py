"""What a hook learns of an all-to-all."""

import pytest
import torch

from moe_lightning.expert_parallel import collectives


@pytest.mark.parametrize("async_op", [False, True])
def test_bytes_are_those_that_arrive_and_not_those_that_leave(async_op, monkeypatch):
    monkeypatch.setattr(collectives.dist, "all_to_all_single", lambda *args, **options: None)
    work = collectives.Work("dispatch/forward", async_op=async_op)
    work.start(torch.zeros(3, 8), None, [1, 2], [4, 1])
    assert work.bytes_received == 5 * 8 * 4
