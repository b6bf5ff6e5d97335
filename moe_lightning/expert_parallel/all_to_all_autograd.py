"""What autograd sees of rows that go to other ranks by all-to-all and come back: five steps, each with its gradient.

    split -> dispatch_start -> dispatch_wait -> (experts) -> combine_start -> combine_wait

Backward mirrors forward: a gradient is sent where the rows were waited for, and waited for where they were sent.
Autograd runs later nodes first, so what overlapped a transfer in forward overlaps it in backward too. Rows and
gradients are received where they are summed up (`ops.buffer`): nothing has to bring them together.

Legend: N slots of this rank, S rows of a chunk sent, R received, O local ones, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.expert_parallel.collectives import AllToAll
from moe_lightning.ops import buffer
from moe_lightning.ops.buffer import Segment, SegmentedBuffer
from moe_lightning.ops.ep_layout import merge_rows, split_rows

Grads = tuple[Tensor | None, ...]


class ReceiveBuffers(NamedTuple):
    """Where the rows of a pass are received when they come back, and their gradients."""

    rows: SegmentedBuffer
    grads: SegmentedBuffer

    @classmethod
    def allocate(cls, segments: Sequence[int], slots: int) -> ReceiveBuffers:
        """For N slots; `segments` are the rows of each chunk that travel and the local ones."""
        return cls(SegmentedBuffer(segments, slots), SegmentedBuffer(segments, slots))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, segments: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.slots, ctx.kept = rows_ND.shape[0], sum(segments)
        return buffer.split(rows_ND, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        grad_ND = buffer.assemble(grads, ctx.slots)
        if ctx.kept < ctx.slots:
            grad_ND[ctx.kept :] = 0  # no sum has them, but anomaly detection reads them
        return grad_ND, None


class _DispatchStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, dispatch: AllToAll) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.start(rows_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor) -> Grads:
        return ctx.dispatch.wait_backward(), None


class _DispatchWait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _pending_RD: Tensor, local_OD: Tensor, perm: Tensor, dispatch: AllToAll, received: Segment,
        local: Segment,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(perm)
        ctx.dispatch, ctx.received, ctx.local = dispatch, received, local
        return merge_rows(dispatch.wait(), local_OD, perm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        [perm] = ctx.saved_tensors
        grad_RD, grad_OD = split_rows(grad, perm, sum(ctx.dispatch.recv), ctx.local)
        ctx.dispatch.start_backward(grad_RD, ctx.received)
        # A placeholder of the right shape: `_DispatchStart` takes what is received.
        return grad_RD, grad_OD, None, None, None, None


class _CombineStart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, perm: Tensor, combine: AllToAll, received: Segment, local: Segment
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(perm)
        ctx.combine = combine
        sent_RD, local_OD = split_rows(rows, perm, sum(combine.send), local)
        return combine.start(sent_RD, received), local_OD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor, grad_OD: Tensor) -> Grads:
        [perm] = ctx.saved_tensors
        return merge_rows(ctx.combine.wait_backward(), grad_OD, perm), None, None, None, None


class _CombineWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: int, combines: Sequence[AllToAll], *parts: Tensor) -> Tensor:
        ctx.combines, ctx.segments = combines, [part.shape[0] for part in parts]
        for combine in combines:
            combine.wait()
        return buffer.assemble(parts, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Grads:
        grads = buffer.split(grad_ND, ctx.segments)
        for combine, grad_SD in zip(reversed(ctx.combines), grads[-2::-2], strict=True):
            combine.start_backward(grad_SD)
        return None, None, *grads  # placeholders, and the gradients of local rows


def split(rows_ND: Tensor, segments: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of so many rows each: of each chunk those that travel and the local ones."""
    return _Split.apply(rows_ND, segments)


def dispatch_start(rows_SD: Tensor, dispatch: AllToAll) -> Tensor:
    """Send a chunk's rows, sorted by rank; the result (R, D) is for `dispatch_wait` alone."""
    return _DispatchStart.apply(rows_SD, dispatch)


def dispatch_wait(
    pending_RD: Tensor, local_OD: Tensor, perm: Tensor, dispatch: AllToAll, buffers: ReceiveBuffers, chunk: int
) -> Tensor:
    """Wait for a chunk's rows: (R + O, D) with the local ones, row i of both at ``perm[i]``."""
    received, local = (Segment(buffers.grads, 2 * chunk + i) for i in (0, 1))
    return _DispatchWait.apply(pending_RD, local_OD, perm, dispatch, received, local)


def combine_start(
    rows: Tensor, perm: Tensor, combine: AllToAll, buffers: ReceiveBuffers, chunk: int
) -> tuple[Tensor, Tensor]:
    """Send back a chunk's rows that were received, in the order in which they were; and the local ones, (O, D)."""
    received, local = (Segment(buffers.rows, 2 * chunk + i) for i in (0, 1))
    return _CombineStart.apply(rows, perm, combine, received, local)


def combine_wait(parts: Sequence[Tensor], combines: Sequence[AllToAll], slots: int) -> Tensor:
    """Wait for all chunks' rows: (N, D) as they were before `split`; after them is whatever the memory holds.

    The gradient is sent to all ranks' chunks at once: a caller that needs one chunk's gradient must need every chunk's.
    """
    return _CombineWait.apply(slots, combines, *parts)
