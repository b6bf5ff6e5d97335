"""What an exported model says of itself: strings in the metadata of its graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from moe_lightning import __version__
from moe_lightning.data import TextDataModule
from moe_lightning.layers import MoE
from moe_lightning.models import MLP
from moe_lightning.models.hyperparameters import stored_config
from moe_lightning.routers import router_name

#: A larger tokenizer is not put into the graph.
LARGEST_TOKENIZER = 1 << 20


def model_facts(model: nn.Module) -> dict[str, str]:
    """The model's name, its sizes, its router and the version of this package."""
    sizes = (
        {"model": "mlp", "hidden": model.first.in_features}
        if isinstance(model, MLP)
        else getattr(model, "architecture", {})
    )
    facts: dict[str, Any] = {"moe_lightning": __version__, **sizes}
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    if routers:
        facts["router"] = router_name(routers[0])
    return {name: str(value) for name, value in facts.items()}


def checkpoint_facts(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The optimizer step, and where the data was ours the context it was trained with and its tokenizer.

    `tokenizer` is bytes or bpe, `tokenizer_json` what `load_tokenizer` reads, left out beyond `LARGEST_TOKENIZER`.
    """
    facts = {"step": str(checkpoint["global_step"])}
    if "seq_len" in (data := stored_config(checkpoint).get("data") or {}):
        facts["seq_len"] = str(data["seq_len"])
    tokenizer = (checkpoint.get(TextDataModule.__qualname__) or {}).get("tokenizer")
    if tokenizer is not None:
        facts["tokenizer"] = str(json.loads(tokenizer)["kind"])
        if len(tokenizer) <= LARGEST_TOKENIZER:
            facts["tokenizer_json"] = tokenizer
    return facts
