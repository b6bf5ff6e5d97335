import math

import pytest
import torch

from moe_lightning.layers import FeedForward
from moe_lightning.layers.feed_forward import activate, hidden_width


def test_swiglu_by_hand():
    # gate 1 and -2, up 3 and 5: silu(z) = z / (1 + exp(-z))
    expected = [3 * 1 / (1 + math.exp(-1)), 5 * -2 / (1 + math.exp(2))]
    torch.testing.assert_close(activate(torch.tensor([1.0, -2.0, 3.0, 5.0]), "swiglu"), torch.tensor(expected))


def test_gelu_by_hand():
    expected = [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in (1.0, -2.0)]
    torch.testing.assert_close(activate(torch.tensor([1.0, -2.0]), "gelu"), torch.tensor(expected))


def test_widths():
    assert (hidden_width("swiglu", 12), hidden_width("gelu", 12)) == (24, 12)
    with pytest.raises(ValueError, match=r"^activation: must be 'swiglu' or 'gelu', got 'relu'"):
        hidden_width("relu", 12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_feed_forward_is_down_of_activation_of_up(activation):
    layer, x = FeedForward(8, 12, activation), torch.randn(2, 5, 8)
    y, routing = layer(x)
    assert routing is None
    expected = activate(x @ layer.up.weight.T, activation) @ layer.down.weight.T
    torch.testing.assert_close(y, expected)
    assert layer.up.bias is layer.down.bias is None
