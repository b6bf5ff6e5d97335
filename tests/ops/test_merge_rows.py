"""Rows of two sources in one order and apart again: literal rows, every dtype."""

import pytest
import torch
from ops_checks import DEVICES

from moe_lightning.ops.buffer import Segment, SegmentedBuffer
from moe_lightning.ops.ep_layout import merge_rows, split_rows


def test_literal_rows():
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    perm = torch.tensor([2, 0, 1]).int()
    assert merge_rows(first, second, perm).tolist() == [[2], [3], [1]]
    assert [table.tolist() for table in split_rows(torch.tensor([[2.0], [3.0], [1.0]]), perm, 2)] == [
        [[1], [2]],
        [[3]],
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 24, 1031])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (7, 0), (300, 41)])
def test_each_undoes_the_other(first, second, width, dtype, device):
    tables = [torch.randn(n, width, device=device).to(dtype) for n in (first, second)]
    perm = torch.randperm(first + second, device=device).int()
    rows = merge_rows(*tables, perm)
    assert torch.equal(rows[perm.long()], torch.cat(tables))
    buffer = SegmentedBuffer([1, second], 1 + second)
    memory = buffer.take(0, rows)
    for into in (None, Segment(buffer, 1)):
        back = split_rows(rows, perm, first, into)
        for table, expected in zip(back, tables, strict=True):
            assert torch.equal(table, expected)
    assert not second or back[1].data_ptr() == memory.data_ptr() + memory.nbytes


def test_places_that_do_not_fit():
    rows, perm = torch.randn(3, 2), torch.arange(4).int()
    with pytest.raises(ValueError, match=r"^ops\.merge_rows: .* got \(3, 2\), \(3, 2\), perm=4$"):
        merge_rows(rows, rows, perm)
    with pytest.raises(ValueError, match=r"^ops\.split_rows: .* got \(3, 2\), perm=4$"):
        split_rows(rows, perm, 1)
    with pytest.raises(ValueError, match=r"^ops\.split_rows: .* second rows, \(2, 2\), got \(1, 2\)$"):
        split_rows(rows, perm[:3], 1, Segment(SegmentedBuffer([1], 1), 0))
