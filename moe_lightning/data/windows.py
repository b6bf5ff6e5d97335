"""Cut a stream of tokens into sequences, and the sequences into batches.

B batch size, L sequence length, W ranks, N windows
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    """The non-overlapping runs of L + 1 tokens of a split: L inputs and, one to the right, L targets.

    ``tokens`` is 1-D; what is left at its end is not used. ``name`` is the split's, for error messages.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, name: str, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.name = name
        self.seq_len = seq_len
        self._tokens = tokens
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._tokens) // (self.seq_len + 1)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Windows ``indices`` as one int64 tensor (B, L + 1)."""
        positions = np.asarray(indices)[:, None] * (self.seq_len + 1) + np.arange(self.seq_len + 1)
        return torch.from_numpy(np.asarray(self._tokens[positions], dtype=np.int64))

    def fetch(self, batches: Any) -> Iterator[torch.Tensor]:
        """The windows of each of ``batches``, int64 arrays (B), as int64 tensors (B, L + 1), in order."""
        return iter(
            DataLoader(
                self,
                batch_sampler=batches,
                collate_fn=_as_is,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # else the iterator draws its seed from the global generator
            )
        )

    def require(self, count: int, remedy: str) -> None:
        """Raise ValueError, ending in ``remedy``, where there are fewer than ``count`` windows."""
        if len(self) < count:
            size = self.seq_len + 1
            raise ValueError(
                f"data: the {self.name} split is too short, got {len(self._tokens)} tokens, needs "
                f"{count * size} ({count} x {size}); use more text or {remedy}"
            )


def rank_share(order_N: torch.Tensor, batch_size: int, rank: int, world_size: int) -> torch.Tensor:
    """Rank's part of ``order_N``: (batches, B), equally many on every rank.

    Step i of all ranks together is ``order_N[i * B * W : (i + 1) * B * W]``, dealt out like cards, so the
    same windows make a step whenever B * W is the same. What does not fill a step is dropped.
    """
    batches = len(order_N) // (batch_size * world_size)
    dealt = order_N[: batches * batch_size * world_size].view(batches, batch_size, world_size)
    return dealt[:, :, rank]


def _as_is(batch: Any) -> Any:
    return batch
