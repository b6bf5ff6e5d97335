"""fp32 numbers as bf16 pieces, and sums of the parts of a product."""

import pytest
import torch

from moe_lightning.ops import split_bf16 as module
from moe_lightning.ops.split_bf16 import split_bf16, sum_parts

SHAPES = [(0, 4), (1, 1), (7, 3), (33, 16), (1000, 64), (5, 130)]


@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_hold_all_bits_and_stand_in_the_order_asked_for(dim):
    value = torch.randn(5, 8) * torch.logspace(-20, 20, 8)
    pieces = split_bf16(value, (2, 0, 1, 0), dim).chunk(4, dim)
    assert (pieces[0].double() + pieces[1].double() + pieces[2].double()).equal(value.double())
    assert pieces[1].equal(value.bfloat16())
    assert pieces[3].equal(pieces[1])
    assert pieces[2].equal((value - pieces[1].float()).bfloat16())


def test_parts_are_added_in_their_order():
    parts = torch.randn(6, 9)
    assert sum_parts(parts, 1).equal(parts[:, :3] + parts[:, 3:6] + parts[:, 6:])
    assert sum_parts(parts, 0).equal(parts[:2] + parts[2:4] + parts[4:])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: split_bf16(torch.ones(2, 2).half(), (0,), 0), "must be an fp32 matrix"),
        (lambda: split_bf16(torch.ones(4), (0,), 0), r"shape=\(4,\)"),
        (lambda: split_bf16(torch.ones(2, 2), (0, 3), 0), r"order=\(0, 3\)"),
        (lambda: split_bf16(torch.ones(2, 2), (), 0), "one to four"),
        (lambda: sum_parts(torch.ones(3, 4), 1), "3 parts along dim"),
    ],
)
def test_bad_arguments_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_give_the_bits_of_the_reference(shape, dim):
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(shape, device="cuda", generator=generator)
    for order in ((0,), (0, 1, 2), (0, 1, 2, 0), (0, 0, 0, 1)):
        for given in (value, value.T.contiguous().T):
            assert split_bf16(given, order, dim).equal(module._split_reference(given, order, dim))
    parts = torch.randn([3 * size if d == dim else size for d, size in enumerate(shape)], device="cuda")
    first, second, third = parts.chunk(3, dim)
    assert sum_parts(parts, dim).equal(first + second + third)
