"""Room on the GPU for transfers that run beside the experts.

The expert kernels take every multiprocessor and keep it until they end: the kernel of a transfer would wait for them,
or they for it. While a transfer is under way they leave as many multiprocessors as it has blocks.
"""

from __future__ import annotations

from moe_lightning.ops import native

#: Blocks of NCCL's kernels, at most, between GPUs of one host.
TRANSFER_BLOCKS = 24

_under_way = 0


def count_transfers(change: int) -> None:
    """So many more, or fewer, are under way."""
    global _under_way
    before, _under_way = _under_way, _under_way + change
    if (before > 0) != (_under_way > 0) and native.missing("cuda") is None and native.module("cuda").CUTLASS:
        native.module("cuda").ffn_leave_multiprocessors(TRANSFER_BLOCKS if _under_way else 0)
