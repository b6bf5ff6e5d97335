"""One linear map an expert over rows sorted by expert: the reference loop and torch's grouped product.

Legend: N rows, E experts, I in, O out. Rows behind the last offset are undefined (loop: zero).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lightning.layers.precision import compute_dtype


def loop_linear(rows_NI: Tensor, weight_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """One product an expert. Reads the offsets on the host: on a GPU this synchronises."""
    offsets = expert_offsets.tolist()
    weight_EOI = weight_EOI.to(compute_dtype(rows_NI))
    parts = [
        F.linear(rows_NI[start:end].to(weight_EOI.dtype), weight_OI)
        for start, end, weight_OI in zip(offsets[:-1], offsets[1:], weight_EOI, strict=True)
    ]
    tail = parts[0].new_zeros(rows_NI.shape[0] - offsets[-1], weight_EOI.shape[1])
    return torch.cat([*parts, tail])


def grouped_linear(rows_NI: Tensor, weight_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` with offsets on the device.

    In bf16 on sm_90 one kernel that never waits; in fp32 and fp16 torch loops over the groups and reads the offsets.
    """
    dtype = compute_dtype(rows_NI)
    product = F.grouped_mm if dtype == torch.bfloat16 else _eager_grouped_mm
    return product(rows_NI.to(dtype), weight_EOI.to(dtype).mT, offs=expert_offsets[1:])


#: torch.compile knows the shape of the bf16 product only.
_eager_grouped_mm = torch.compiler.disable(F.grouped_mm)
