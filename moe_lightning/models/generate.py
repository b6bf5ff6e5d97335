"""Sampling text from a language model.

Legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lightning.utils.checks import check_not_negative, check_sizes


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

    A row ends at the first `eos_id` that is sampled; where other rows go on, it is filled up with `eos_id`.

    Args:
        model: maps ids (B, S) to `LMOutput`; use it in eval mode.
        tokens_BS: int64 prompt, at least one token.
        max_new_tokens: how many to add.
        context_length: the model sees at most this many last tokens.
        temperature: 0, or less than fp32 can divide by, is greedy.
        top_k: sample among this many most likely tokens; None, or more than there are: among all.
        eos_id: the token that ends a text; None: every row gets `max_new_tokens`.
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
            raise ValueError("generate: logits must be finite, got NaN or infinity; use an older checkpoint")
        next_B = _sample(logits_BV, temperature, top_k, generator)
        if eos_id is not None:
            next_B = next_B.masked_fill(done_B, eos_id)
            done_B |= next_B == eos_id
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], 1)
        if bool(done_B.all()):
            break
    return tokens_BS


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    limits = torch.finfo(torch.float32)
    if temperature < limits.tiny:
        return logits_BV.argmax(-1)
    # The largest becomes 0, so that no quotient is +inf; masked only after, as -inf / inf would be NaN.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / min(temperature, limits.max)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        cutoff_B = logits_BV.topk(top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(logits_BV < cutoff_B, -torch.inf)
    return torch.multinomial(torch.softmax(scaled_BV, -1), 1, generator=generator)[:, 0]
