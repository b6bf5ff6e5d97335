"""`transformer_decoder`: the dense baseline."""

from __future__ import annotations

from moe_lightning.layers import FeedForward
from moe_lightning.layers.feed_forward import Activation, hidden_width
from moe_lightning.models.decoder import Decoder
from moe_lightning.utils.checks import check_fraction, check_positive, check_sizes
from moe_lightning.utils.memory import check_fits_memory


class TransformerDecoder(Decoder):
    """Decoder with one dense feed-forward network a layer, `mlp_hidden_dim` wide; the rest as in `Decoder`."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_heads: int = 8,
        n_layers: int = 6,
        mlp_hidden_dim: int = 2048,
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
        }
        check_sizes("transformer_decoder", **sizes)
        check_fraction("transformer_decoder", "dropout", dropout)
        check_positive("transformer_decoder", "rope_theta", rope_theta)
        feed_forward = d_model * (hidden_width(activation, mlp_hidden_dim) + mlp_hidden_dim)
        parameters = 2 * vocab_size * d_model + n_layers * (4 * d_model**2 + feed_forward)
        check_fits_memory("transformer_decoder", parameters, **sizes)
        layers = [FeedForward(d_model, mlp_hidden_dim, activation) for _ in range(n_layers)]
        super().__init__(vocab_size, d_model, n_heads, layers, dropout, rope_theta, tie_embeddings)
        self.architecture = {
            "model": "transformer_decoder",
            **sizes,
            "activation": activation,
            "rope_theta": rope_theta,
            "tie_embeddings": tie_embeddings,
        }
