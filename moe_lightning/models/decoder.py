"""The decoder that the dense and the MoE model share: embedding, blocks of attention and feed-forward, logits.

Legend: B batch, S sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from moe_lightning.layers import Attention
from moe_lightning.layers.attention import rope_tables
from moe_lightning.models.output import LMOutput
from moe_lightning.routers import Routing


class Block(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward network that may route."""

    def __init__(self, d_model: int, n_heads: int, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.attention = Attention(d_model, n_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Routing | None]:
        """(B, S, D) -> (B, S, D), with the layer's routing if it has one."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC))
        y_BSD, routing = self.feed_forward(self.feed_forward_norm(x_BSD))
        return x_BSD + self.dropout(y_BSD), routing


class Decoder(nn.Module):
    """Token ids (B, S) -> `LMOutput`.

    Args:
        vocab_size: V.
        d_model: D, divisible by n_heads.
        n_heads: attention heads.
        feed_forwards: one a layer; each maps (B, S, D) to itself and a `Routing` or None.
        dropout: on attention weights and both residual branches, in training.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: use the embedding as the output projection.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        feed_forwards: Iterable[nn.Module],
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        #: What a checkpoint must share with the model it is loaded into, by name.
        self.architecture: dict[str, Any] = {}
        self.vocab_size, self.d_model, self.n_heads, self.rope_theta = (
            vocab_size,
            d_model,
            n_heads,
            rope_theta,
        )
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, ff, dropout) for ff in feed_forwards)
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """N(0, 0.02), with projections into the residual stream scaled by 1/sqrt(2 * layers) as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            into_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight", "experts.down"))
            scale = (2 * len(self.blocks)) ** -0.5 if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens_BS: Tensor) -> LMOutput:
        """Logits of the next token at every position."""
        cos_SC, sin_SC = rope_tables(
            tokens_BS.shape[1], self.d_model // self.n_heads, self.rope_theta, tokens_BS.device
        )
        x_BSD = self.dropout(self.embedding(tokens_BS))
        routings = []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD, cos_SC, sin_SC)
            if routing is not None:
                routings.append(routing)
        return LMOutput(self.head(self.norm(x_BSD)), tuple(routings))

    def flops_per_token(self, seq_len: int) -> float:
        """Useful forward FLOPs of one token: two a weight it meets, plus causal attention over seq_len / 2 keys."""
        weights = sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()
        if self.head.weight is self.embedding.weight:
            weights += self.head.weight.numel()
        idle = sum(getattr(block.feed_forward, "inactive_parameters", 0) for block in self.blocks)
        attention = 4 * self.d_model * (seq_len / 2) * len(self.blocks)
        return 2.0 * (weights - idle) + attention
