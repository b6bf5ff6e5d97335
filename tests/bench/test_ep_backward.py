"""bench ep with --backward: what each time holds, in a group of one rank."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_lightning.bench.cli import Settings
from moe_lightning.bench.ep import measure
from moe_lightning.bench.roofline import Shape
from moe_lightning.bench.spread import Spread

SHAPE = Shape(tokens=12, d_model=8, num_experts=4, top_k=2, mlp_hidden_dim=8, size=4)
SETTINGS = Settings(torch.device("cpu"), torch.float32, ("fused_select",), False, 3, 0.5, 0, 0.0, 1)


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("backward", "rounds_of_exchanges"), [(False, 1), (True, 2)])
def test_t_comm_and_the_layers_are_of_the_same_directions(group_of_one, monkeypatch, backward, rounds_of_exchanges):
    asked, outputs = [], {}
    monkeypatch.setattr(
        measure, "exchanges", lambda dispatcher, splits, x_TD, times: asked.append(times) or (lambda: None)
    )

    def once(calls, rounds, device):
        outputs.update({name: call() for name, call in calls.items()})
        return {name: Spread.of([1.0] * 3) for name in calls}

    monkeypatch.setattr(measure, "measure", once)
    settings = replace(SETTINGS, backward=backward)
    measure.measure_router("fused_select", SHAPE, settings, 1, torch.device("cpu"))
    assert asked == [rounds_of_exchanges]
    for name in ("T_seq", "T_comp"):
        gradients = isinstance(outputs[name], tuple)
        assert gradients == backward
        if backward:  # of the tokens, the gate, up and down
            assert [g.shape[0] for g in outputs[name]] == [12, 4, 4, 4]
