"""The mean of gradients over ranks, once backward is done: in few large all-reduces, into the tensors they are in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from moe_lightning.utils.errors import annotate_error

#: Gradients that are reduced together, as large as NVLink needs them to be, and no copy of all of them.
BUCKET_BYTES = 256 << 20


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], ranks: int, group: dist.ProcessGroup | None) -> None:
    """Divide the gradients by `ranks`, and then add them up over a group, as DDP does. A collective.

    A gradient that is missing on some ranks is zero there, and they get the sum; one that no rank has stays missing.
    Only a rank on which one is missing waits for the device.

    Args:
        parameters: the same on every rank, in one order.
        ranks: of the mean.
        group: None: nothing is added.
    """
    if group is None:
        if gradients := [p.grad for p in parameters if p.grad is not None]:
            torch._foreach_mul_(gradients, 1 / ranks)
        return
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    missing = [i for i, p in enumerate(parameters) if p.grad is None]
    there = gradients[0].new_ones(len(gradients))  # how many ranks have each, after the sum
    for i in missing:
        there[i] = 0
    for bucket in _take_tensors([*gradients, there], BUCKET_BYTES):
        flat = _flatten_dense_tensors(bucket).mul_(1 / ranks)
        with annotate_error("the sum of gradients"):
            dist.all_reduce(flat, group=group)
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))
    if missing:
        given = there.tolist()
        for i in missing:
            if given[i]:
                parameters[i].grad = gradients[i]
