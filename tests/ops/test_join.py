"""Rows of two tables in one order and apart again: literal rows, every dtype."""

import pytest
import torch
from ops_checks import DEVICES

from moe_lightning.ops.buffer import Segment, SegmentedBuffer
from moe_lightning.ops.join import disjoin, join


def test_literal_rows():
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    places = torch.tensor([2, 0, 1]).int()
    assert join(first, second, places).tolist() == [[2], [3], [1]]
    assert [table.tolist() for table in disjoin(torch.tensor([[2.0], [3.0], [1.0]]), places, 2)] == [[[1], [2]], [[3]]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 24, 1031])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (7, 0), (300, 41)])
def test_each_undoes_the_other(first, second, width, dtype, device):
    tables = [torch.randn(n, width, device=device).to(dtype) for n in (first, second)]
    places = torch.randperm(first + second, device=device).int()
    rows = join(*tables, places)
    assert torch.equal(rows[places.long()], torch.cat(tables))
    buffer = SegmentedBuffer([1, second], 1 + second)
    memory = buffer.take(0, rows)
    for into in (None, Segment(buffer, 1)):
        back = disjoin(rows, places, first, into)
        for table, expected in zip(back, tables, strict=True):
            assert torch.equal(table, expected)
    assert not second or back[1].data_ptr() == memory.data_ptr() + memory.nbytes


def test_places_that_do_not_fit():
    rows, places = torch.randn(3, 2), torch.arange(4).int()
    with pytest.raises(ValueError, match=r"^ops\.join: .* got \(3, 2\), \(3, 2\), places=4$"):
        join(rows, rows, places)
    with pytest.raises(ValueError, match=r"^ops\.disjoin: .* got \(3, 2\), places=4$"):
        disjoin(rows, places, 1)
    with pytest.raises(ValueError, match=r"^ops\.disjoin: .* its rows, \(2, 2\), got \(1, 2\)$"):
        disjoin(rows, places[:3], 1, Segment(SegmentedBuffer([1], 1), 0))
