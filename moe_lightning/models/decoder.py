"""The dense and the MoE decoder: embedding, blocks of attention and feed-forward, logits.

Legend: B batch, S sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.layers import Attention, Experts, FeedForward, MoE, SharedExperts
from moe_lightning.layers.attention import rope_tables
from moe_lightning.layers.experts import compute_dtype
from moe_lightning.layers.recompute import recompute
from moe_lightning.models.config import DecoderConfig, DecoderMoEConfig
from moe_lightning.routers import NO_TOKENS, Routing, Tokens


class LMOutput(NamedTuple):
    """Next-token logits (B, S, V), and the routing of each MoE layer in order (empty for a dense model)."""

    logits_BSV: Tensor
    routings: tuple[Routing, ...] = ()


class LMHidden(NamedTuple):
    """What the head makes logits of, (B, S, D), and the routings as in `LMOutput`."""

    hidden_BSD: Tensor
    routings: tuple[Routing, ...] = ()


class Block(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward network that may route.

    A `compiled` block leaves what its feed-forward network returns to the next one to add: so all that lies between two
    routed layers is one region of few kernels.
    """

    def __init__(self, d_model: int, n_heads: int, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.attention = Attention(d_model, n_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)
        self.compiled = False

    @override
    def forward(
        self, x_BSD: Tensor, y_BSD: Tensor | None, cos_SC: Tensor, sin_SC: Tensor, tokens: Tokens = NO_TOKENS
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """The residual stream x and what is still to be added to it, each (B, S, D); the layer's routing, if any."""
        compiled = self.compiled and not torch.compiler.is_exporting()
        attend = _compiled_attend() if compiled else Block.attend
        x_BSD, h_BSD = attend(self, x_BSD, y_BSD, cos_SC, sin_SC)
        y_BSD, routing = self.feed_forward(h_BSD, tokens)
        return (x_BSD, y_BSD, routing) if compiled else (x_BSD + self.dropout(y_BSD), None, routing)

    def attend(self, x_BSD: Tensor, y_BSD: Tensor | None, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the input of the feed-forward network."""
        if y_BSD is not None:
            x_BSD = x_BSD + self.dropout(y_BSD)
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC))
        # In the dtype of what reads it, and of its gradient: the residual stream alone is wider.
        return x_BSD, self.feed_forward_norm(x_BSD).to(compute_dtype(x_BSD))


@cache
def _compiled_attend() -> Callable[..., tuple[Tensor, Tensor]]:
    """One function for all blocks, compiled once."""
    return torch.compile(Block.attend)


#: Weights of the projections into the residual stream.
_INTO_RESIDUAL = ("attention.out.weight", "feed_forward.down.weight", "shared.down.weight", "experts.down")


class Decoder(nn.Module):
    """Token ids (B, S) -> `LMOutput`.

    Args:
        config: its sizes; those of the feed-forward networks are left to these.
        feed_forwards: one per layer; each maps (B, S, D) to itself and a `Routing` or None.
    """

    def __init__(self, config: DecoderConfig, feed_forwards: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        d_model, dropout = config.d_model, config.dropout
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, config.n_heads, ff, dropout) for ff in feed_forwards)
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """N(0, 0.02), with projections into the residual stream scaled by 1/sqrt(2 * layers) as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            into_residual = name.endswith(_INTO_RESIDUAL)
            scale = (2 * len(self.blocks)) ** -0.5 if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)

    @override
    def forward(self, tokens_BS: Tensor, logits: bool = True, mask_BS: Tensor | None = None) -> LMOutput | LMHidden:
        """Logits of the next token at every position; without `logits`, what `head` would make them of.

        Where the bool mask is False is padding behind a sequence's tokens: in no load, and in no loss of the routers.
        """
        config = self.config
        head_dim = config.d_model // config.n_heads
        cos_SC, sin_SC = rope_tables(tokens_BS.shape[1], head_dim, config.rope_theta, tokens_BS.device)
        x_BSD, y_BSD = self.dropout(self.embedding(tokens_BS)), None
        routings = []
        mask_T = None if mask_BS is None else mask_BS.flatten()
        tokens = Tokens(tokens_BS.flatten(), mask_T, tokens_BS.shape[1])
        for block in self.blocks:
            inputs = x_BSD, y_BSD, cos_SC, sin_SC, tokens
            if config.recompute == "block":
                draws = self.training and config.dropout > 0
                x_BSD, y_BSD, routing = recompute(block, *inputs, preserve_rng_state=draws)
            else:
                x_BSD, y_BSD, routing = block(*inputs)
            if routing is not None:
                routings.append(routing)
        if y_BSD is not None:
            x_BSD = x_BSD + self.dropout(y_BSD)
        hidden_BSD = self.norm(x_BSD)
        return LMOutput(self.head(hidden_BSD), tuple(routings)) if logits else LMHidden(hidden_BSD, tuple(routings))

    def compile_blocks(self) -> None:
        """Compile all but the MoE layers, whose phases stay eager and timed; once for all blocks."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = True
            dense = block.feed_forward.shared if isinstance(block.feed_forward, MoE) else block.feed_forward
            if dense is not None:
                dense.compile()

    @property
    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must share with the model it is loaded into, by name."""
        return self.config.architecture

    def flops_per_token(self, seq_len: int) -> float:
        """Useful forward FLOPs of one token: two per weight it meets, plus causal attention over seq_len / 2 keys."""
        weights = sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()
        if self.head.weight is self.embedding.weight:
            weights += self.head.weight.numel()
        idle = sum(getattr(block.feed_forward, "inactive_parameters", 0) for block in self.blocks)
        attention = 4 * self.config.d_model * (seq_len / 2) * len(self.blocks)
        return 2.0 * (weights - idle) + attention


class TransformerDecoder(Decoder):
    """`transformer_decoder`, the dense baseline: one feed-forward network per layer."""

    def __init__(self, config: DecoderConfig) -> None:
        sizes = config.d_model, config.mlp_hidden_dim, config.activation
        super().__init__(config, [FeedForward(*sizes) for _ in range(config.n_layers)])


class DecoderMoE(Decoder):
    """`decoder_moe`: an MoE layer in each block but the first `n_dense_layers`; dropless unless the router drops."""

    def __init__(self, config: DecoderMoEConfig) -> None:
        dense = config.d_model, config.hidden_dim_of_dense_layers, config.activation
        layers: list[nn.Module] = [FeedForward(*dense) for _ in range(config.n_dense_layers)]
        layers += [_moe_layer(config) for _ in range(config.n_layers - config.n_dense_layers)]
        super().__init__(config, layers)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, first to last."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE)]


def _moe_layer(config: DecoderMoEConfig) -> MoE:
    d_model, hidden_dim, shared = config.d_model, config.mlp_hidden_dim, None
    if config.n_shared_experts:
        shared_dim = config.n_shared_experts * hidden_dim
        shared = SharedExperts(d_model, shared_dim, config.activation, config.shared_expert_gate)
    return MoE(
        config.router(d_model, config.num_experts + config.n_zero_experts, config.top_k),
        Experts(d_model, hidden_dim, config.num_experts, config.activation, config.experts),
        overlap_chunks=config.overlap_chunks,
        recompute=config.recompute == "moe",
        shared=shared,
        n_zero_experts=config.n_zero_experts,
    )
