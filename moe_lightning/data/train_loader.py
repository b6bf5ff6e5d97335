"""Shuffled training batches whose place in the data is part of the checkpoint."""

import hashlib
from collections.abc import Callable, Iterator

import torch

from moe_lightning.data.windows import Windows, rank_share


class TrainLoader:
    """An endless stream of batches of int64 tokens (B, L + 1); iterating takes the next epoch's worth of it.

    The stream is one epoch after the other, each with every window once, in an order that depends on nothing
    but (seed, epoch). The place is kept here and not in the iterator, and iterating goes on from it, so that
    a resumed run sees exactly the batch after the last one trained on. Nothing happens before the first
    ``next``, and the global generator is never touched.

    Why a stream: Lightning keeps the state of a loader that has ``state_dict`` and ``load_state_dict``, but
    after a resume it calls ``iter`` more or less often than it ends an epoch, and may miscount its epochs.
    Why no ``DataLoader``: Lightning would rebuild one around a DistributedSampler.

    Args:
        windows: the sequences of the train split.
        batch_size: B.
        seed: of the shuffling.
        rank: of this process, in [0, world_size).
        world_size: processes that share the epoch.
        fingerprint: name of the data; a place in other data is refused.
        unfinished: how many of the batches handed out were not trained on: 1 where an exception in mid-step
            is being saved.
        previous: a loader of an earlier fit, whose place is taken over if it is one in the same batches.

    Raises:
        ValueError: there is less text than one batch on every rank.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
        unfinished: Callable[[], int] = lambda: 0,
        previous: "TrainLoader | None" = None,
    ) -> None:
        windows.require(batch_size * world_size, "a smaller batch_size or seq_len")
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = fingerprint
        self._unfinished = unfinished
        self._position = 0  # batches handed out since the start of training
        if previous is not None and previous._identity() == self._identity():
            self._position, self._seed = previous._position, previous._seed

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return len(self._windows) // (self._batch_size * self._world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        end = self._position + len(self)
        while self._position < end:
            epoch, start = divmod(self._position, len(self))
            order_N = torch.randperm(len(self._windows), generator=_generator(self._seed, epoch))
            batches = rank_share(order_N, self._batch_size, self._rank, self._world_size)
            for batch in self._windows.fetch(batches[start : start + end - self._position].numpy()):
                self._position += 1
                yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The place in the stream, and what it is a place in."""
        return {"batches": self._position - self._unfinished(), "seed": self._seed, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to a saved place, with its seed; ValueError where it is a place in other data or batches."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"data: resume needs the checkpoint's {name}, got {mine}, saved {state.get(name)}; "
                    "use the same text, tokenizer, seq_len and batch_size x devices, or start a new run"
                )
        self._position, self._seed = int(state["batches"]), int(state["seed"])

    def _identity(self) -> dict[str, int | str]:
        return {
            "text": self._fingerprint,
            "seq_len": self._windows.seq_len,
            "global_batch_size": self._batch_size * self._world_size,
        }


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Hashed, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common.
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
