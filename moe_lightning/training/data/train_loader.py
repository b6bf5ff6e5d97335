"""Shuffled training batches whose place in the data is part of the checkpoint."""

import hashlib
from collections.abc import Callable, Iterator

import torch

from moe_lightning.training.data.windows import Windows, rank_share


class TrainLoader:
    """Batches of int64 tokens (B, L + 1), in an order that depends on nothing but (seed, epoch).

    Iterating goes on from where the loader stands; after the last batch of an epoch it starts the next one.
    The place (epoch, batches handed out) is kept here and not in the iterator, so that a resumed run sees
    exactly the batch after the last one trained on. The global generator is never touched.

    Lightning keeps the state of a loader that has ``state_dict`` and ``load_state_dict``, and tells its
    ``sampler`` the epoch. It calls ``iter`` more often than it iterates, and before it sets the epoch:
    nothing happens until the first ``next``. This is no ``DataLoader``, because Lightning would rebuild one
    around a DistributedSampler.

    Args:
        windows: the sequences of the train split.
        batch_size: B.
        seed: of the shuffling.
        rank: of this process, in [0, world_size).
        world_size: processes that share the epoch.
        fingerprint: name of the data; a place in other data is refused.
        unfinished: how many of the batches handed out were not trained on: 1 where an exception in mid-step
            is being saved.

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
    ) -> None:
        windows.require(batch_size * world_size, "a smaller batch_size or seq_len")
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = fingerprint
        self._unfinished = unfinished
        self._epoch = 0
        self._handed_out = 0

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return len(self._windows) // (self._batch_size * self._world_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._handed_out >= len(self):
            self.set_epoch(self._epoch + 1)
        order_N = torch.randperm(len(self._windows), generator=_generator(self._seed, self._epoch))
        batches = rank_share(order_N, self._batch_size, self._rank, self._world_size)
        for batch in self._windows.fetch(batches[self._handed_out :]):
            self._handed_out += 1
            yield batch

    @property
    def sampler(self) -> "TrainLoader":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless the loader is in it already."""
        if epoch != self._epoch:
            self._epoch, self._handed_out = epoch, 0

    def state_dict(self) -> dict[str, int | str]:
        """The place in the data, and what it is a place in."""
        done = max(0, self._handed_out - self._unfinished())
        return {"epoch": self._epoch, "batch": done, "seed": self._seed, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go to a saved place, with its seed; ValueError where it is a place in other data or batches."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"data: resume needs the checkpoint's {name}, got {mine}, saved {state.get(name)}; "
                    "use the same text, tokenizer, seq_len and batch_size x devices, or start a new run"
                )
        self._epoch, self._handed_out = int(state["epoch"]), int(state["batch"])
        self._seed = int(state["seed"])

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
