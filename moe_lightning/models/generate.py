"""Sampling text from a language model.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lightning.checks import check_not_negative, check_sizes


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokens_BS: Tensor,
    max_new_tokens: int,
    *,
    context_length: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append up to `max_new_tokens` sampled tokens to prompts (B, S); returns (B, S + new).

    Args:
        model: maps ids (B, S) to `LMOutput`; use it in eval mode.
        tokens_BS: int64 prompt, at least one token.
        max_new_tokens: how many to add.
        context_length: the model sees at most this many last tokens.
        temperature: 0 is greedy.
        top_k: sample among this many most likely tokens; None: among all.
        eos_id: stop once every row has produced it.
        generator: source of randomness.
    """
    check_sizes("generate", max_new_tokens=max_new_tokens, context_length=context_length)
    check_not_negative("generate", "temperature", temperature)
    if top_k is not None:
        check_sizes("generate", top_k=top_k)
    if tokens_BS.shape[1] < 1:
        raise ValueError("generate: a prompt needs at least one token, got an empty prompt; give some text")
    done_B = torch.zeros(tokens_BS.shape[0], dtype=torch.bool, device=tokens_BS.device)
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BS[:, -context_length:]).logits_BSV[:, -1].float()
        if not bool(logits_BV.isfinite().all()):
            raise ValueError("generate: logits must be finite, got NaN or infinity; the weights are spoilt")
        next_B = _sample(logits_BV, temperature, top_k, generator)
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], 1)
        if eos_id is not None:
            done_B |= next_B == eos_id
            if bool(done_B.all()):
                break
    return tokens_BS


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        cutoff_B = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < cutoff_B, -torch.inf)
    return torch.multinomial(torch.softmax(logits_BV / temperature, -1), 1, generator=generator)[:, 0]
