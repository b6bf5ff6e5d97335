"""Room on the GPU for transfers that run beside the experts.

The expert kernels take every multiprocessor and keep it until they end: the kernel of a transfer would wait for them,
or they for it. While a transfer is under way they leave as many multiprocessors as it has blocks.
"""

from __future__ import annotations

#: Blocks of NCCL's kernels, at most, between GPUs of one host.
TRANSFER_BLOCKS = 24

_under_way = 0


def count_transfers(change: int) -> None:
    """So many more, or fewer, are under way."""
    global _under_way
    _under_way += change


def sm_margin() -> int:
    """Multiprocessors that the expert kernels leave to the transfers under way."""
    return TRANSFER_BLOCKS if _under_way else 0
