"""AdamW with weight-decay groups, and the warm-up and cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from moe_lightning.checks import check_fraction, check_not_negative


@dataclass
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) under a linear warm-up and a cosine decay (arXiv:1608.03983).

    Args:
        learning_rate: peak learning rate.
        weight_decay: for matrices; vectors (norms) are not decayed.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        warmup_steps: optimizer steps from 0 to the peak.
        min_lr_ratio: the cosine ends at this share of the peak.
        decay_steps: optimizer steps until the end of the cosine; None: the trainer's total.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"optimizer: learning_rate must be positive and finite, got learning_rate={self.learning_rate}"
            )
        check_not_negative("optimizer", "weight_decay", self.weight_decay)
        check_not_negative("optimizer", "warmup_steps", self.warmup_steps)
        check_fraction("optimizer", "beta1", self.beta1)
        check_fraction("optimizer", "beta2", self.beta2)
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer: min_lr_ratio must be in [0, 1], got min_lr_ratio={self.min_lr_ratio}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optimizer: decay_steps must be positive, got decay_steps={self.decay_steps}")


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the two groups; not its fused form, which cannot be clipped under 16-mixed."""
    return torch.optim.AdamW(
        weight_decay_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )


def warmup_cosine(step: int, warmup_steps: int, total_steps: float, min_lr_ratio: float) -> float:
    """Share of the peak learning rate at an optimizer step; constant after the warm-up if the total is unbounded."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if math.isinf(total_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, trainer_steps: float) -> LambdaLR:
    """The schedule over `config.decay_steps`, or over the trainer's steps."""
    total = config.decay_steps or trainer_steps
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, config.warmup_steps, total, config.min_lr_ratio))
