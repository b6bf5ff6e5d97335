"""The same batches in the same order, every time: for validation, test and overfitting."""

from collections.abc import Iterator

import torch

from moe_lightning.training.data.windows import Windows, rank_share


class EvalLoader:
    """Batches of int64 tokens (B, L + 1) in the order of the text, equally many on every rank, no padding.

    With ``max_tokens`` (targets, over all ranks) the windows are spread evenly over the split. Every batch
    has B rows, and windows that do not fill one are left out; where there is less than one batch for every
    rank, there is a single smaller one. ValueError where there is less than one window a rank.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        windows.require(world_size, "a smaller seq_len")
        count = len(windows)
        if max_tokens is not None:
            count = min(count, max(world_size, max_tokens // windows.seq_len))
        batch_size = min(batch_size, count // world_size)
        count -= count % (batch_size * world_size)
        order_N = torch.arange(count) * len(windows) // count
        self._windows = windows
        self._batches = rank_share(order_N, batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._windows.fetch(self._batches)
