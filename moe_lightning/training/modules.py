"""The three models as LightningModules with flat arguments, for the command line."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.layers.experts import Implementation
from moe_lightning.layers.feed_forward import Activation
from moe_lightning.layers.moe import Chunks
from moe_lightning.layers.recompute import Recompute
from moe_lightning.models import (
    DecoderConfig,
    DecoderMoE,
    DecoderMoEConfig,
    LMHidden,
    LMOutput,
    MLPDecoder,
    RouterFactory,
    TransformerDecoder,
)
from moe_lightning.routers import FusedSelect, load_balancing_loss, sequence_balance_loss, z_loss
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.checks import check_not_negative


class MLPModule(LanguageModule):
    """`mlp`: next token from the current one alone.

    Args:
        vocab_size: set by the data's tokenizer.
        d_model: width.
        kwargs: see `LanguageModule`.
    """

    def __init__(self, vocab_size: int, d_model: int = 128, **kwargs: Any) -> None:
        super().__init__(MLPDecoder(vocab_size, d_model), **kwargs)


class TransformerDecoderModule(LanguageModule):
    """`transformer_decoder`: the dense baseline; arguments as in `TransformerDecoder` and `LanguageModule`."""

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
        recompute: Recompute = "none",
        **kwargs: Any,
    ) -> None:
        network = TransformerDecoder(DecoderConfig.of(locals()))
        super().__init__(network, **kwargs)


class DecoderMoEModule(LanguageModule):
    """`decoder_moe`: a Mixture of Experts in every block, or in all but the first.

    Args:
        vocab_size: set by the data's tokenizer.
        d_model: D, divisible by n_heads.
        n_heads: attention heads.
        n_layers: blocks.
        mlp_hidden_dim: F, hidden size of one expert.
        num_experts: E.
        top_k: K, experts a token is sent to.
        router: a name of `routers.ROUTERS`, or a class of your own by import path.
        experts: auto, cutlass, grouped_mm or loop.
        overlap_chunks: under ddp_ep, chunks of a layer's tokens that travel and are worked on in turn; auto: by what
            joins the ranks.
        n_shared_experts: experts that every token takes beside its K, computed as one network (DeepSeekMoE).
        shared_expert_gate: multiply what they return by a sigmoid of the token (Qwen2-MoE).
        n_zero_experts: Z, choices beside the E experts that return the token itself and cost nothing (LongCat-Flash).
        n_dense_layers: of so many first layers a feed-forward network takes the place of the experts (DeepSeekMoE).
        dense_hidden_dim: its hidden size; by default that of all experts that a token takes.
        activation: swiglu or gelu.
        dropout: on attention weights and residual branches.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: use the embedding as the output projection.
        balance_coef: weight of the load-balancing loss, mean over layers (Switch: 0.01).
        balance_scope: rank: load of one rank's micro-batch; global: load summed over ranks.
        sequence_balance_coef: weight of the balance loss of each sequence by itself, mean over layers (DeepSeek-V3:
            0.0001); with the scores of the router.
        z_coef: weight of the router z-loss, mean over layers, over one rank's micro-batch (ST-MoE: 0.001).
        recompute: what is computed again in backward, in place of being kept for it: none; moe: dispatch, experts and
            combine of each MoE layer; block: each block. Routing is decided once.
        kwargs: see `LanguageModule`.
    """

    network: DecoderMoE

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
        n_shared_experts: int = 0,
        shared_expert_gate: bool = False,
        n_zero_experts: int = 0,
        n_dense_layers: int = 0,
        dense_hidden_dim: int | None = None,
        activation: Activation = "swiglu",
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = False,
        balance_coef: float = 0.01,
        balance_scope: Literal["rank", "global"] = "rank",
        sequence_balance_coef: float = 0.0,
        z_coef: float = 0.001,
        recompute: Recompute = "none",
        **kwargs: Any,
    ) -> None:
        check_not_negative("decoder_moe", "balance_coef", balance_coef)
        check_not_negative("decoder_moe", "sequence_balance_coef", sequence_balance_coef)
        check_not_negative("decoder_moe", "z_coef", z_coef)
        network = DecoderMoE(DecoderMoEConfig.of(locals()))
        super().__init__(network, **kwargs)
        self.balance_coef = balance_coef
        self.balance_scope = balance_scope
        self.sequence_balance_coef = sequence_balance_coef
        self.z_coef = z_coef

    @override
    def auxiliary_losses(self, output: LMOutput | LMHidden) -> dict[str, Tensor]:
        """Load-balancing losses and z-loss, averaged over layers."""
        losses: dict[str, Tensor] = {}
        if self.balance_coef:
            sums_over_ranks = self.balance_scope == "global"  # which is not compiled
            balance = load_balancing_loss if sums_over_ranks else self.loss_region(load_balancing_loss)
            balance_L = torch.stack([balance(r, self.balance_scope) for r in output.routings])
            losses["balance_loss"] = self.balance_coef * balance_L.mean()
        if self.sequence_balance_coef:
            of_layer = self.loss_region(sequence_balance_loss)
            routers = [layer.router for layer in self.network.moe_layers]
            balance_L = torch.stack(
                [
                    of_layer(routing, getattr(router, "score", "softmax"), router.top_k)
                    for routing, router in zip(output.routings, routers, strict=True)
                ]
            )
            losses["sequence_balance_loss"] = self.sequence_balance_coef * balance_L.mean()
        if self.z_coef:
            of_layer = self.loss_region(z_loss)
            losses["z_loss"] = self.z_coef * torch.stack([of_layer(r) for r in output.routings]).mean()
        return losses
