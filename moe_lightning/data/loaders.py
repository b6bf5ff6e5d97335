"""Batches of token ids: shuffled for training, in order for validation and test, prompts to be continued.

Legend: B batch size, L sequence length, W ranks, N windows.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moe_lightning.data.tokenizer import Tokenizer


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

    Step i of all ranks together is ``order_N[i * B * W : (i + 1) * B * W]``, dealt out in turn, so the
    same windows make a step whenever B * W is the same. What does not fill a step is dropped.
    """
    batches = len(order_N) // (batch_size * world_size)
    dealt = order_N[: batches * batch_size * world_size].view(batches, batch_size, world_size)
    return dealt[:, :, rank]


def _as_is(batch: Any) -> Any:
    return batch


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


class EvalLoader:
    """Batches of int64 tokens (B, L + 1) in the order of the text: every window once, as many batches on every rank.

    The windows are dealt out to the ranks in turn, B to each. The last batch holds what is left: it may be smaller,
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


class PromptLoader:
    """One int64 batch (1, length) per prompt, the same on every rank; an empty prompt is end-of-text."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for prompt in self._prompts:
            ids = self._tokenizer.encode(prompt).tolist() or [self._tokenizer.eos_id]
            yield torch.tensor([ids])
