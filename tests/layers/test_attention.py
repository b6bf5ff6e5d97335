import math

import pytest
import torch

from moe_lightning.layers import Attention
from moe_lightning.layers.attention import rope_tables, rotate


def tables(seq_len: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(seq_len, head_dim, 10000.0, torch.device("cpu"))


def test_against_softmax_written_out():
    attention, x_BSD = Attention(24, 3), torch.randn(2, 11, 24)
    cos_SC, sin_SC = tables(11, 8)
    q, k, v = attention.qkv(x_BSD).chunk(3, -1)
    heads = []
    for h in range(3):
        columns = slice(8 * h, 8 * h + 8)
        q_BSC, k_BSC = (rotate(z[..., columns], cos_SC, sin_SC) for z in (q, k))
        scores = q_BSC @ k_BSC.mT / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., columns])
    expected = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x_BSD, cos_SC, sin_SC), expected, rtol=1e-4, atol=1e-5)


def test_a_position_sees_itself_and_the_past():
    attention = Attention(16, 2)
    x_BSD = torch.randn(1, 9, 16, requires_grad=True)
    y_BSD = attention(x_BSD, *tables(9, 8))
    for s in range(9):
        (gradient,) = torch.autograd.grad(y_BSD[0, s].sum(), x_BSD, retain_graph=True)
        reached = gradient[0].abs().sum(1)
        assert (reached[: s + 1] > 0).all()
        assert reached[s + 1 :].eq(0).all()


def test_dropout_in_training_only():
    attention, x_BSD = Attention(16, 2, dropout=0.5), torch.randn(1, 9, 16)
    assert not attention.train()(x_BSD, *tables(9, 8)).equal(attention(x_BSD, *tables(9, 8)))
    assert attention.eval()(x_BSD, *tables(9, 8)).equal(attention(x_BSD, *tables(9, 8)))
    plain = Attention(16, 2).eval()
    plain.load_state_dict(attention.state_dict())
    assert attention(x_BSD, *tables(9, 8)).equal(plain(x_BSD, *tables(9, 8)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_a_row_comes_back_without_one(device, dtype):
    """A rank for which nothing is left of a validation batch still calls the model: its layers are collectives."""
    attention = Attention(16, 2).to(device, dtype)
    empty_BSD = torch.empty(0, 9, 16, device=device, dtype=dtype)
    y_BSD = attention(empty_BSD, *(table.to(device, dtype) for table in tables(9, 8)))
    assert (y_BSD.shape, y_BSD.dtype) == ((0, 9, 16), dtype)


@pytest.mark.parametrize("n_heads", [3, 0, -2, 32])
def test_heads_must_divide_the_width(n_heads):
    with pytest.raises(ValueError, match=rf"^attention: d_model must be divisible .* d_model=16, n_heads={n_heads}$"):
        Attention(16, n_heads)


def test_a_head_must_hold_pairs():
    with pytest.raises(ValueError, match=r"must be even for rotary positions, got d_model=9, n_heads=3"):
        Attention(9, 3)
