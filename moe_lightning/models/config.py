"""The arguments of the decoders, in one place: models, LightningModules, export and checkpoints read them here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_args

from typing_extensions import override

from moe_lightning.layers.experts import Implementation
from moe_lightning.layers.feed_forward import Activation, hidden_width
from moe_lightning.layers.moe import Chunks
from moe_lightning.layers.recompute import Recompute
from moe_lightning.routers import FusedSelect, Router
from moe_lightning.utils.checks import check_choice, check_fraction, check_int, check_positive, check_sizes
from moe_lightning.utils.memory import check_fits_memory

#: Makes a router from (d_model, num_experts, top_k); a router class is one.
RouterFactory = Callable[[int, int, int], Router]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Of `TransformerDecoder`.

    Args:
        vocab_size: V.
        d_model: D, divisible by n_heads.
        n_heads: attention heads.
        n_layers: blocks.
        mlp_hidden_dim: F, hidden size of a feed-forward network.
        activation: "swiglu" or "gelu".
        dropout: on attention weights and both residual branches, in training.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: use the embedding as the output projection.
        recompute: "block": keep the input of each block for backward, and compute the block again there.

    Raises:
        ValueError: an argument out of range, or weights that do not fit in memory.
    """

    model: ClassVar[str] = "transformer_decoder"
    sizes: ClassVar[tuple[str, ...]] = ("vocab_size", "d_model", "n_heads", "n_layers", "mlp_hidden_dim")
    recomputable: ClassVar[tuple[Recompute, ...]] = ("none", "block")

    vocab_size: int
    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 6
    mlp_hidden_dim: int = 2048
    activation: Activation = "swiglu"
    dropout: float = 0.0
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in self.sizes}
        check_sizes(self.model, **sizes)
        check_fraction(self.model, "dropout", self.dropout)
        check_positive(self.model, "rope_theta", self.rope_theta)
        check_choice(self.model, "recompute", self.recompute, self.recomputable)
        attention = self.n_layers * 4 * self.d_model**2
        embeddings = 2 * self.vocab_size * self.d_model
        check_fits_memory(self.model, embeddings + attention + self.feed_forward_parameters, **sizes)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From those of the arguments that it has."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Itself: it never changes, and a router factory may hold what cannot be copied."""
        return self

    @property
    def feed_forward_parameters(self) -> int:
        """Of all layers."""
        return self.n_layers * self.network_parameters(self.mlp_hidden_dim)

    def network_parameters(self, hidden_dim: int) -> int:
        """Of a feed-forward network."""
        return self.d_model * (hidden_width(self.activation, hidden_dim) + hidden_dim)

    @property
    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must share with the model it is loaded into, by name."""
        names = (*self.sizes, "activation", "rope_theta", "tie_embeddings")
        return {"model": self.model, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, kw_only=True)
class DecoderMoEConfig(DecoderConfig):
    """Of `DecoderMoE`; what it adds to `DecoderConfig`.

    Args:
        num_experts: E; mlp_hidden_dim is the hidden size of one.
        top_k: K, experts per token.
        router: makes a layer's router.
        experts: how the experts are computed, see `Experts`.
        overlap_chunks: see `MoE`.
        n_shared_experts: experts of mlp_hidden_dim that every token takes beside its own, see `SharedExperts`.
        shared_expert_gate: whether the shared experts have a gate.
        n_zero_experts: Z, choices beside the E experts that return the token itself (LongCat-Flash, arXiv:2509.01322).
        n_dense_layers: the first layers that have a feed-forward network in place of experts (DeepSeekMoE,
            arXiv:2401.06066, section 5.1.2).
        dense_hidden_dim: its hidden size; by default that of the experts that a token takes, shared ones included.
        recompute: "moe": keep the tokens of each MoE layer and their routing for backward, and dispatch and compute the
            experts again there; "block" as there, with the routing of the first pass.
    """

    model: ClassVar[str] = "decoder_moe"
    sizes: ClassVar[tuple[str, ...]] = (*DecoderConfig.sizes, "num_experts", "top_k")
    recomputable: ClassVar[tuple[Recompute, ...]] = get_args(Recompute)

    num_experts: int = 8
    top_k: int = 2
    router: RouterFactory = FusedSelect
    experts: Implementation = "auto"
    overlap_chunks: Chunks = 1
    n_shared_experts: int = 0
    shared_expert_gate: bool = False
    n_zero_experts: int = 0
    n_dense_layers: int = 0
    dense_hidden_dim: int | None = None

    #: What a checkpoint of before does not name, with what it then is.
    added: ClassVar[dict[str, Any]] = {
        "n_shared_experts": 0,
        "shared_expert_gate": False,
        "n_zero_experts": 0,
        "n_dense_layers": 0,
        "dense_hidden_dim": None,
    }

    @override
    def __post_init__(self) -> None:
        check_sizes(self.model, **{name: getattr(self, name) for name in self.sizes})
        for name in ("n_shared_experts", "n_zero_experts", "n_dense_layers"):
            check_int(self.model, name, getattr(self, name), 0)
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError(f"{self.model}: shared_expert_gate needs shared experts, got n_shared_experts=0; set it")
        if self.n_dense_layers >= self.n_layers:
            raise ValueError(
                f"{self.model}: n_dense_layers must leave a layer to the experts, got n_dense_layers="
                f"{self.n_dense_layers}, n_layers={self.n_layers}; for none at all there is transformer_decoder"
            )
        if self.dense_hidden_dim is not None:
            check_sizes(self.model, dense_hidden_dim=self.dense_hidden_dim)
            if not self.n_dense_layers:
                raise ValueError(
                    f"{self.model}: dense_hidden_dim needs dense layers, got dense_hidden_dim={self.dense_hidden_dim}, "
                    "n_dense_layers=0; set it"
                )
        super().__post_init__()

    @property
    def hidden_dim_of_dense_layers(self) -> int:
        """As given, or of what a token takes in other layers."""
        return self.dense_hidden_dim or (self.top_k + self.n_shared_experts) * self.mlp_hidden_dim

    @property
    @override
    def feed_forward_parameters(self) -> int:
        of_expert = self.network_parameters(self.mlp_hidden_dim)
        moe = (self.n_layers - self.n_dense_layers) * (self.num_experts + self.n_shared_experts) * of_expert
        return moe + self.n_dense_layers * self.network_parameters(self.hidden_dim_of_dense_layers)

    @property
    @override
    def architecture(self) -> dict[str, Any]:
        added = {name: getattr(self, name) for name, default in self.added.items() if getattr(self, name) != default}
        return super().architecture | added
