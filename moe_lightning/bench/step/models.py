"""The models whose step is measured: one set of weights each, shared by all forms in which a step can be run.

Legend: T tokens of a micro-batch, E experts, K top_k, L layers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.base import moe_layers
from moe_lightning.data import TextDataModule
from moe_lightning.layers.recompute import Recompute
from moe_lightning.metrics import ExpertLoadSummary
from moe_lightning.ops import Selection
from moe_lightning.routers import Router, Tokens, router_class
from moe_lightning.training.language_module import LanguageModule, why_not_compile
from moe_lightning.training.modules import DecoderMoEModule, TransformerDecoderModule
from moe_lightning.training.optimizer import OptimizerConfig, build_optimizer, build_schedule
from moe_lightning.training.optimizer_step import OptimizerStep, StepPrecision

#: What is trained, by the name in tables: the MoE under its own router's load and under a forced one, the dense model.
ROUTER, BALANCED, DENSE = "MoE", "MoE, balanced", "dense"
#: How a step is run, by the name on the command line.
FORMS = ("eager", "compile", "graph", "compile+graph")
#: Added to the logits of experts that a forced choice leaves out.
_OUT_OF_REACH = -1e4


@dataclass(frozen=True)
class StepSizes:
    """Of model and batch."""

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_dim: int
    num_experts: int
    top_k: int
    vocab_size: int
    seq_len: int
    batch_size: int
    accumulate: int
    router: str
    precision: StepPrecision
    recompute: Recompute = "none"

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.accumulate * self.micro_batch_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """T."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Variant:
    """A row: what is trained, and how."""

    model: str
    form: str

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return "compile" in self.form

    @property
    def graphed(self) -> bool:
        """Whether forward and backward are CUDA graphs."""
        return "graph" in self.form

    def with_graph(self, graphed: bool) -> Variant:
        """The same kernels, with or without CUDA graphs."""
        form = ("compile+graph" if graphed else "compile") if self.compiled else ("graph" if graphed else "eager")
        return Variant(self.model, form)

    def __str__(self) -> str:
        """As in messages."""
        return f"{self.model}, {self.form}"


def why_not(form: str, device: torch.device) -> str | None:
    """Why a step cannot be run in this form here; None where it can."""
    if "graph" in form and device.type != "cuda":
        return f"CUDA graphs need a GPU, the device is {device.type}"
    if "compile" in form and device.type == "cuda":
        return why_not_compile()
    if "compile" in form and device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        return "torch.compile needs a C++ compiler on PATH"
    return None


def balanced_router(
    kind: type[Router], tokens: int, num_experts: int, top_k: int, device: torch.device
) -> type[Router]:
    """A router class that sends T tokens evenly to all experts, K each, by the kernels of `kind`.

    What it adds to the logits leaves `kind` no other choice, and where they are not what it chooses by it is given one:
    loads differ by one slot at most. Which experts a token gets is drawn at random, with a seed.
    """
    generator = torch.Generator().manual_seed(0)
    place_T = torch.randperm(tokens, generator=generator)
    ids_TK = (place_T[:, None] * top_k + torch.arange(top_k)) % num_experts
    given_TK = ids_TK.int().to(device)
    bias_TE = torch.full((tokens, num_experts), _OUT_OF_REACH).scatter_(1, ids_TK, 0.0).to(device)

    class BalancedRouter(kind):  # type: ignore[valid-type,misc]
        """Of batches of T tokens alone."""

        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("bias_TE", bias_TE, persistent=False)
            self.register_buffer("given_TK", given_TK, persistent=False)

        @override
        def select_experts(self, logits_TE: Tensor, tokens: Tokens) -> Selection:
            if kind.needs_token_ids:
                return self.select_given(logits_TE, self.given_TK, tokens)
            return super().select_experts(logits_TE, tokens)

        @override
        def gate(self, x_TD: Tensor) -> Tensor:
            return super().gate(x_TD) + self.bias_TE

    return BalancedRouter


class StepModel:
    """Weights and moments of a model, and a module per form that computes with them.

    Args:
        dense: the dense model of the same active FLOPs, its hidden size top_k times an expert's; else the MoE.
        sizes: of the MoE and its batches.
        device: where it is.
    """

    def __init__(self, dense: bool, sizes: StepSizes, device: torch.device) -> None:
        self.sizes, self._dense, self._device = sizes, dense, device
        torch.manual_seed(0)
        with device:
            self._first = self._build()
        self._modules: dict[tuple[bool, bool], LanguageModule] = {}
        config = OptimizerConfig()
        self._optimizer = build_optimizer(self._first.network, config)
        self._schedule = build_schedule(self._optimizer, config, float("inf"))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rows that it has."""
        return (DENSE,) if self._dense else (ROUTER, BALANCED)

    @property
    def flops_per_token(self) -> float:
        """Useful ones of forward and backward."""
        return 3 * self._first.network.flops_per_token(self.sizes.seq_len)  # type: ignore[operator]

    def train(self, batches: Iterator[Tensor], steps: int, form: str) -> None:
        """So many optimizer steps; after them the learning rate is 0, by which weights stay and kernels do the same."""
        step = self.step(Variant(self.names[0], form), self._schedule)
        for _ in range(steps):
            step([next(batches) for _ in range(self.sizes.accumulate)])
        step.close()
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0

    def step(self, variant: Variant, schedule: Any = None) -> OptimizerStep:
        """In a variant's form; several may take turns."""
        module, sizes = self.module(variant), self.sizes
        return OptimizerStep(
            module,
            self._optimizer,
            sizes.precision,
            sizes.accumulate,
            cuda_graph=variant.graphed,
            schedule=schedule,
        )

    def module(self, variant: Variant) -> LanguageModule:
        """It has the weights of all others."""
        balanced, compiled = variant.model == BALANCED, variant.compiled
        if (balanced, compiled) not in self._modules:
            with torch.device("meta"):
                module = self._build()
            if balanced:
                self._force_balance(module)
            module.load_state_dict(self._first.state_dict(keep_vars=True), assign=True)
            if compiled:
                module.compile_regions()
            self._modules[balanced, compiled] = module
        return self._modules[balanced, compiled]

    def load(self, model: str, batches: Sequence[Tensor]) -> dict[str, float] | None:
        """Skew of the experts' load over these micro-batches, the mean and the most of all layers; None: no experts."""
        module = self.module(Variant(model, FORMS[0]))
        if not (layers := moe_layers(module)):
            return None
        counts_LE = torch.zeros(len(layers), self.sizes.num_experts, dtype=torch.int64, device=self._device)
        mixed = self.sizes.precision == "bf16-mixed"
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=mixed):
            for batch in batches:
                routings = module.network(batch[:, :-1], logits=False).routings
                counts_LE += torch.stack([routing.selection.tokens_per_expert_E for routing in routings])
        summary = ExpertLoadSummary(counts_LE, counts_LE.sum(1))
        return {
            "max_over_mean": summary.max_over_mean_L.mean().item(),
            "max_over_mean_of_worst_layer": summary.max_over_mean_L.max().item(),
            "cv": summary.cv_L.mean().item(),
        }

    def _build(self) -> LanguageModule:
        sizes = self.sizes
        widths: dict[str, Any] = {
            name: getattr(sizes, name) for name in ("vocab_size", "d_model", "n_heads", "n_layers")
        }
        if self._dense:
            hidden_dim = sizes.top_k * sizes.mlp_hidden_dim
            recompute: Recompute = "block" if sizes.recompute == "block" else "none"
            return TransformerDecoderModule(**widths, mlp_hidden_dim=hidden_dim, recompute=recompute, compile=False)
        experts = {name: getattr(sizes, name) for name in ("mlp_hidden_dim", "num_experts", "top_k", "recompute")}
        return DecoderMoEModule(**widths, **experts, router=router_class(sizes.router), compile=False)

    def _force_balance(self, module: LanguageModule) -> None:
        sizes = self.sizes
        counts = sizes.num_experts, sizes.top_k
        kind = balanced_router(router_class(sizes.router), sizes.micro_batch_tokens, *counts, self._device)
        with self._device:
            for layer in moe_layers(module):
                layer.router = kind(sizes.d_model, *counts)


def text_batches(sizes: StepSizes, path: str | None, device: torch.device) -> Iterator[Tensor]:
    """Micro-batches of the train split, byte by byte, without end, int64 (batch_size, seq_len + 1) on the device."""
    data = TextDataModule(path, seq_len=sizes.seq_len, batch_size=sizes.batch_size)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return (batch.to(device) for epoch in repeat(loader) for batch in epoch)
