import pytest
import torch

from moe_lightning.layers.attention import rope_tables, rotate


def as_complex(x: torch.Tensor) -> torch.Tensor:
    first, second = x.double().chunk(2, -1)
    return torch.complex(first, second)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_is_a_product_with_a_unit_complex_number(head_dim):
    x_BHSC = torch.randn(2, 3, 50, head_dim)
    rotated = as_complex(rotate(x_BHSC, *rope_tables(50, head_dim, 10000.0, torch.device("cpu"))))
    positions = torch.arange(50, dtype=torch.float64)[:, None]
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    expected = as_complex(x_BHSC) * torch.exp(1j * positions * frequencies)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    tables = rope_tables(64, 8, 10000.0, torch.device("cpu"))
    q_SC, k_SC = rotate(q.expand(64, 8), *tables), rotate(k.expand(64, 8), *tables)
    scores = q_SC @ k_SC.T
    for distance in (-20, -1, 0, 3, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[0, 1:] - scores[0, 0]).abs().max() > 0.1


def test_position_zero_is_left_alone_and_length_is_kept():
    x = torch.randn(1, 1, 30, 16)
    rotated = rotate(x, *rope_tables(30, 16, 500.0, torch.device("cpu")))
    assert rotated[..., 0, :].equal(x[..., 0, :])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_turns_half_precision_in_fp32():
    x = torch.randn(1, 1, 300, 16).bfloat16()
    tables = rope_tables(300, 16, 10000.0, torch.device("cpu"))
    assert rotate(x, *tables).equal(rotate(x.float(), *tables).bfloat16())


def test_a_longer_table_begins_with_the_shorter():
    short, long = (rope_tables(n, 16, 10000.0, torch.device("cpu")) for n in (10, 40))
    assert long[0][:10].equal(short[0])
    assert long[1][:10].equal(short[1])
