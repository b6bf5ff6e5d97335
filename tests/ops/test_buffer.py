"""Rows filled in segments are one tensor without a copy; a copy where they are elsewhere."""

import pytest
import torch

from moe_lightning.ops.buffer import Segment, SegmentedBuffer, assemble, split

COUNTS = [3, 0, 2, 1]


def fill(x_ND, buffer):
    """The segments of a buffer with the rows of a tensor, the last ones first."""
    parts = list(split(x_ND, COUNTS))
    for i in reversed(range(len(parts))):
        parts[i] = Segment(buffer, i).take(parts[i]).copy_(parts[i])
    return parts


@pytest.mark.parametrize("rows", [6, 8])
def test_segments_are_one_tensor(rows):
    x_ND, buffer = torch.randn(rows, 5), SegmentedBuffer(COUNTS, rows)
    parts = fill(x_ND, buffer)
    whole = assemble(parts, rows)
    assert whole.shape == (rows, 5)
    assert whole.data_ptr() == parts[0].data_ptr()
    assert torch.equal(whole[:6], x_ND[:6])


def test_a_segment_is_given_once():
    buffer = SegmentedBuffer(COUNTS, 6)
    first = assemble(fill(torch.ones(6, 2), buffer), 6)
    assert torch.equal(assemble(fill(torch.zeros(6, 2), buffer), 6), torch.zeros(6, 2))
    assert torch.equal(first, torch.ones(6, 2))


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("other", range(len(COUNTS)))
def test_a_part_from_elsewhere_is_copied(other, rows):
    x_ND = torch.randn(rows, 5)
    parts = fill(x_ND, SegmentedBuffer(COUNTS, rows))
    parts[other] = parts[other].clone()
    assert torch.equal(assemble(parts, rows)[:6], x_ND[:6])


def test_parts_of_smaller_and_of_larger_memory_are_copied():
    part = torch.randn(3, 2)
    assert torch.equal(assemble([part[:1], part[1:]], 4)[:3], part)
    larger = assemble([part[:1], part[1:2]], 2)
    assert torch.equal(larger, part[:2])
    assert larger.data_ptr() != part.data_ptr()


def test_segments_are_taken_alike():
    buffer = SegmentedBuffer([1, 2], 3)
    buffer.take(0, torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"^ops\.buffer: .* got \(4,\) torch\.float32, then \(4,\) torch\.float64$"):
        buffer.take(1, torch.empty(0, 4, dtype=torch.float64))


def test_a_part_that_is_spread_out():
    part = torch.randn(2, 3).t()
    assert torch.equal(assemble([part], 3), part)


def test_no_rows():
    for rows in (0, 3):
        assert assemble([torch.empty(0, 2)], rows).shape == (rows, 2)


def test_more_parts_than_room():
    with pytest.raises(ValueError, match=r"^ops\.buffer: .* got rows=2, parts of \[3\]$"):
        assemble([torch.randn(3, 2)], 2)
