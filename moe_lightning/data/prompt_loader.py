"""Prompts to be continued."""

from collections.abc import Iterator, Sequence

import torch

from moe_lightning.data.tokenizer import Tokenizer


class PromptLoader:
    """One int64 batch (1, length) a prompt, the same on every rank; an empty prompt is end-of-text."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for prompt in self._prompts:
            ids = self._tokenizer.encode(prompt).tolist() or [self._tokenizer.eos_id]
            yield torch.tensor([ids])
