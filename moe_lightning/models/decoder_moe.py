"""`decoder_moe`: a decoder whose feed-forward networks are Mixtures of Experts."""

from __future__ import annotations

from collections.abc import Callable

from moe_lightning.layers import Experts, MoE
from moe_lightning.layers.experts import Implementation
from moe_lightning.layers.feed_forward import Activation, hidden_width
from moe_lightning.layers.moe import Chunks
from moe_lightning.models.decoder import Decoder
from moe_lightning.routers import FusedSelect, Router
from moe_lightning.utils.checks import check_fraction, check_positive, check_sizes
from moe_lightning.utils.memory import check_fits_memory

#: Makes a router from (d_model, num_experts, top_k); a router class is one.
RouterFactory = Callable[[int, int, int], Router]


class DecoderMoE(Decoder):
    """Decoder with an MoE layer in every block; dropless unless the router has a capacity factor.

    Args:
        vocab_size: V.
        d_model: D, divisible by n_heads.
        n_heads: attention heads.
        n_layers: blocks.
        mlp_hidden_dim: F, hidden size of one expert.
        num_experts: E.
        top_k: K, experts a token is sent to.
        router: makes a layer's router.
        experts: how the experts are computed, see `Experts`.
        overlap_chunks: see `MoE`.
        activation: "swiglu" or "gelu".
        dropout: see `Decoder`.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: use the embedding as the output projection.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_heads: int = 8,
        n_layers: int = 6,
        mlp_hidden_dim: int = 2048,
        num_experts: int = 8,
        top_k: int = 2,
        router: RouterFactory = FusedSelect,
        experts: Implementation = "auto",
        overlap_chunks: Chunks = 1,
        activation: Activation = "swiglu",
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = False,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "mlp_hidden_dim": mlp_hidden_dim,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        check_sizes("decoder_moe", **sizes)
        check_fraction("decoder_moe", "dropout", dropout)
        check_positive("decoder_moe", "rope_theta", rope_theta)
        expert = d_model * (hidden_width(activation, mlp_hidden_dim) + mlp_hidden_dim)
        parameters = 2 * vocab_size * d_model + n_layers * (4 * d_model**2 + num_experts * expert)
        check_fits_memory("decoder_moe", parameters, **sizes)
        layers = [
            MoE(
                router(d_model, num_experts, top_k),
                Experts(d_model, mlp_hidden_dim, num_experts, activation, experts),
                overlap_chunks=overlap_chunks,
            )
            for _ in range(n_layers)
        ]
        super().__init__(vocab_size, d_model, n_heads, layers, dropout, rope_theta, tie_embeddings)
        self.architecture = {
            "model": "decoder_moe",
            **sizes,
            "activation": activation,
            "rope_theta": rope_theta,
            "tie_embeddings": tie_embeddings,
        }

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, first to last."""
        return [block.feed_forward for block in self.blocks]  # type: ignore[misc]
