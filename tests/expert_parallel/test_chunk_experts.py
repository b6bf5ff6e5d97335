"""Weights in groups: the gradients of the whole, in one tensor where they were written there."""

import pytest
import torch

from moe_lightning.expert_parallel import all_to_all
from moe_lightning.expert_parallel.all_to_all import chunk_experts
from moe_lightning.layers import Experts
from moe_lightning.layers.experts import compute_dtype, expert_rows
from moe_lightning.ops.buffer import assemble

E, D, F = 6, 16, 24


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def gradients(experts, rows, grad, counts, groups, times=1):
    """Of rows, up and down, with the experts called group by group, each so many times."""
    rows = rows.detach().requires_grad_()
    each, done = E // groups, []
    implementation = experts.implementation_for(compute_dtype(rows), rows.device)
    weights = chunk_experts(experts.up, experts.down, groups, groups * times)
    for group, part in enumerate(rows.split([sum(counts[i : i + each]) for i in range(0, E, each)])):
        offsets = offsets_of(counts[group * each : (group + 1) * each]).to(rows.device)
        up, down, weight_grads = weights[group]
        arguments = part, up, down, offsets, None, experts.activation, implementation
        done.append(sum(expert_rows(*arguments, weight_grads=weight_grads) for _ in range(times)))
    out = torch.cat(done)
    return out, torch.autograd.grad(out, (rows, experts.up, experts.down), grad)


CASES = [
    ("cpu", torch.float64, "loop"),
    ("cpu", torch.float32, "grouped_mm"),
    pytest.param("cuda", torch.bfloat16, "cutlass", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, "grouped_mm", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize(("device", "dtype", "implementation"), CASES)
def test_groups_are_the_whole(device, dtype, implementation, groups, monkeypatch):
    counts = [5, 0, 9, 1, 0, 16]  # a group of no rows among them
    torch.manual_seed(0)
    experts = Experts(D, F, E, implementation=implementation).to(device, dtype)
    with torch.no_grad():
        experts.up.mul_(20)
        experts.down.mul_(20)
    rows, grad = (torch.randn(sum(counts), D, device=device).to(dtype) for _ in range(2))
    expected, wanted = gradients(experts, rows, grad, counts, 1)
    firsts = []
    assemble = all_to_all.assemble
    monkeypatch.setattr(all_to_all, "assemble", lambda given, n: firsts.append(given[0]) or assemble(given, n))
    out, got = gradients(experts, rows, grad, counts, groups)
    # Our kernels write where the whole gradient will be.
    whole = [first.data_ptr() in [g.data_ptr() for g in got] for first in firsts]
    assert whole == [implementation == "cutlass"] * 2
    assert torch.equal(out, expected)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
    # Two calls of a group: neither overwrites the other's gradient.
    _, twice = gradients(experts, rows, grad, counts, groups, times=2)
    for ours, theirs in zip(twice, wanted, strict=True):
        torch.testing.assert_close(ours, 2 * theirs)


def test_gradients_written_to_the_segments_are_not_copied():
    groups = chunk_experts(torch.randn(6, 5, 2), torch.randn(6, 2, 5), 3, 3)
    segments = [group.weight_grads[0] for group in groups]
    parts = [segments[i].take(groups[i].up) for i in (2, 0, 1)]
    whole = assemble((parts[1], parts[2], parts[0]), 6)
    assert whole.shape == (6, 5, 2)
    assert whole.data_ptr() == parts[1].data_ptr()
    # The next backward pass gets memory of its own; gradients from elsewhere are brought together.
    again = segments[0].take(groups[0].up)
    assert again.data_ptr() != whole.data_ptr()
    other = torch.randn(2, 5, 2)
    assert torch.equal(assemble((again.fill_(1), other, other), 6), torch.cat([torch.ones(2, 5, 2), other, other]))


def test_one_group_is_the_weights_themselves():
    up, down = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    [group] = chunk_experts(up, down, 1, 1)
    assert group.up is up
    assert group.down is down
    assert group.weight_grads is None
