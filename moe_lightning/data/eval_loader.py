"""The same batches in the same order, every time: for validation, test and overfitting."""

from collections.abc import Iterator

import torch

from moe_lightning.data.windows import Windows


class EvalLoader:
    """Batches of int64 tokens (B, L + 1) in the order of the text: every window once, as many batches on every rank.

    The windows are dealt out to the ranks like cards, B to each. The last batch holds what is left: it may be smaller,
    on some ranks by a window more than on others, and where nothing is left for a rank its batch has no row; there is
    no padding. The other batches are full, and there is at least one: B is lowered to a rank's share of the windows.

    Args:
        windows: the sequences of the split.
        batch_size: B.
        max_tokens: targets that are read at most, over all ranks but at least a window on each; the windows are then
            spread evenly over the split.
        full_batches: leave out the windows that do not fill a batch on every rank, as training needs it.
        rank: of this process, in [0, world_size).
        world_size: processes that share the windows.

    Raises:
        ValueError: there is less than one window per rank.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        full_batches: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        windows.require(world_size, "a smaller seq_len")
        count = len(windows)
        if max_tokens is not None:
            count = min(count, max(world_size, max_tokens // windows.seq_len))
        together = min(batch_size, count // world_size) * world_size
        if full_batches:
            count -= count % together
        order_N = torch.arange(count) * len(windows) // count
        self._windows = windows
        self._batches = [step[rank::world_size].numpy() for step in order_N.split(together)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._windows.fetch(self._batches)
