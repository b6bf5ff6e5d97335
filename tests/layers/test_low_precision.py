"""Weights that are cast once: the products see the same values, and the weights get the same gradients."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lightning.layers import Attention, Experts, FeedForward
from moe_lightning.layers.attention import rope_tables
from moe_lightning.layers.low_precision import LowPrecisionWeights


class Casts(TorchDispatchMode):
    """Shapes of all tensors that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return op(*args, **(kwargs or {}))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(32, 2)
        self.dense = FeedForward(32, 48)
        self.experts = Experts(32, 24, 4)

    def forward(self, x_BSD):
        tables = rope_tables(x_BSD.shape[1], 16, 1e4, x_BSD.device)
        y_BSD, _ = self.dense(self.attention(x_BSD, *tables))
        offsets = torch.tensor([0, 3, 3, 7, 10], dtype=torch.int32)
        return self.experts(y_BSD.flatten(0, 1), offsets)


def run(network, x_BSD, upstream):
    network.zero_grad()
    with Casts() as casts:
        out = network(x_BSD)
    out.backward(upstream)
    return casts.shapes, out, [p.grad for p in network.parameters()]


def test_values_and_gradients_are_those_of_autocast_without_its_casts():
    torch.manual_seed(0)
    network, x_BSD = Network(), torch.randn(2, 5, 32)
    upstream = torch.randn(10, 32).bfloat16()
    weights = {p.shape for p in network.parameters()}
    copies = LowPrecisionWeights(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        cast, expected, gradients = run(network, x_BSD, upstream)
        assert weights <= set(cast)
        copies.refresh()
        with copies.used():
            cast, actual, own = run(network, x_BSD, upstream)
    assert not weights & set(cast)
    assert actual.equal(expected)
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(own, gradients, strict=True))


def test_without_autocast_the_weights_themselves_are_read():
    torch.manual_seed(0)
    network, x_BSD = Network(), torch.randn(2, 5, 32)
    expected = network(x_BSD)
    copies = LowPrecisionWeights(network, torch.bfloat16)
    with copies.used():
        assert network(x_BSD).equal(expected)
    with torch.autocast("cpu", torch.bfloat16), copies.used():  # never refreshed
        assert not network(x_BSD).float().allclose(expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x_BSD).float().allclose(expected, rtol=0.1, atol=0.1)
