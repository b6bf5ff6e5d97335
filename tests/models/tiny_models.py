"""Models small enough to test by the dozen."""

import torch
from torch.nn import functional as F

from moe_lightning.models import DecoderConfig, DecoderMoE, DecoderMoEConfig, MLPDecoder, TransformerDecoder
from moe_lightning.routers import ROUTERS

VOCAB = 53
SIZES = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_dim": 48}


def make_moe(router="fused_select", **kwargs) -> DecoderMoE:
    arguments = {**SIZES, "num_experts": 4, "top_k": 2, "router": ROUTERS.get(router, router), **kwargs}
    return DecoderMoE(DecoderMoEConfig(**arguments))


def make_dense(**kwargs) -> TransformerDecoder:
    return TransformerDecoder(DecoderConfig(**{**SIZES, **kwargs}))


MAKERS = {"decoder_moe": make_moe, "transformer_decoder": make_dense, "mlp": lambda: MLPDecoder(VOCAB, 32)}


def some_tokens(batch: int = 2, seq_len: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq_len))


def loss(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    logits_BSV = model(tokens_BS[:, :-1]).logits_BSV
    return F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
