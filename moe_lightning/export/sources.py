"""What is exported: a fresh model of given sizes, or a trained one out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.models import (
    MLP,
    DecoderConfig,
    DecoderMoE,
    DecoderMoEConfig,
    MLPDecoder,
    RouterFactory,
    TransformerDecoder,
)
from moe_lightning.models.hyperparameters import router_factory, stored_arguments
from moe_lightning.routers import router_class
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.checks import check_choice

#: The sizes that each model takes, by the names of the command line, with their defaults.
SIZES: dict[str, dict[str, int]] = {
    "mlp": {"hidden": 128},
    "transformer_decoder": {
        "vocab_size": 32000,
        **{name: getattr(DecoderConfig, name) for name in DecoderConfig.sizes[1:]},
    },
}
SIZES["decoder_moe"] = {
    **SIZES["transformer_decoder"],
    "num_experts": DecoderMoEConfig.num_experts,
    "top_k": DecoderMoEConfig.top_k,
}


def fresh_model(name: str, sizes: dict[str, int], router: str | None, seed: int = 0) -> nn.Module:
    """An untrained model; `sizes` and `router` replace the defaults and must be the model's own.

    Raises:
        ValueError: an unknown model or router, or sizes that the model does not take.
    """
    check_choice("export", "model", name, SIZES)
    foreign = [f"--{size}" for size in sizes if size not in SIZES[name]]
    foreign += ["--router"] if router is not None and name != "decoder_moe" else []
    if foreign:
        raise ValueError(f"export: {name} takes {_flags(name)}, got {', '.join(foreign)}; leave those out")
    arguments: dict[str, Any] = {**SIZES[name], **sizes}
    torch.manual_seed(seed)
    if name == "mlp":
        return MLP(**arguments)
    if name == "transformer_decoder":
        return TransformerDecoder(DecoderConfig(**arguments))
    return DecoderMoE(DecoderMoEConfig(**arguments, router=router_class(router or "fused_select")))


def _flags(name: str) -> str:
    return ", ".join([*(f"--{size}" for size in SIZES[name]), *(["--router"] if name == "decoder_moe" else [])])


def trained_model(path: Path) -> nn.Module:
    """The network of a checkpoint, its sizes, router and weights as they were trained.

    Raises:
        ValueError: the file is missing, damaged, or not one of this project's three models.
    """
    return network_of(load_checkpoint(path), path)


def network_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The same of a checkpoint that is read already; `path` is for the errors."""
    architecture = checkpoint.get("architecture")
    if not isinstance(architecture, dict) or "model" not in architecture:
        raise ValueError(f"checkpoint: it must hold an 'architecture', got none in {path}; train it with train.py")
    sizes = {key: value for key, value in architecture.items() if key != "model"}
    check_choice("export", "the checkpoint's model", architecture["model"], SIZES)
    if architecture["model"] == "mlp":
        network: nn.Module = MLPDecoder(**sizes)
    elif architecture["model"] == "transformer_decoder":
        network = TransformerDecoder(DecoderConfig(**sizes))
    else:
        network = DecoderMoE(DecoderMoEConfig(**sizes, router=_stored_router(checkpoint, path)))
    try:
        network.load_state_dict(network_state(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: its weights must be those of its architecture, got {' '.join(str(error).split())[:200]}"
        ) from error
    return network


def network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint's network, by its own names."""
    stored = checkpoint["state_dict"].items()
    return {key.removeprefix("network."): value for key, value in stored if key.startswith("network.")}


def _stored_router(checkpoint: dict[str, Any], path: Path) -> RouterFactory:
    """The router of the run's stored configuration, with its arguments."""
    stored = stored_arguments(checkpoint)
    if not stored:
        raise ValueError(f"checkpoint: it must hold its configuration, got none in {path}; train it with train.py")
    return router_factory(stored.get("router"))
