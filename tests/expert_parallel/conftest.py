"""What tests of layers share."""

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def group_of_one():
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
