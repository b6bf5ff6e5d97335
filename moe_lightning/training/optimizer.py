"""AdamW with weight-decay groups, and learning-rate schedules that a resumed run takes from its own configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from moe_lightning.ops import native
from moe_lightning.ops.adamw import adamw_
from moe_lightning.routers import update_biases
from moe_lightning.utils.checks import check_choice, check_fraction, check_not_negative

Schedule = Literal["cosine", "wsd"]


@dataclass
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) under a linear warm-up and a schedule.

    Args:
        learning_rate: peak learning rate.
        weight_decay: for matrices; vectors (norms) are not decayed.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        warmup_steps: optimizer steps from 0 to the peak.
        min_lr_ratio: the schedule ends at this share of the peak.
        decay_steps: optimizer steps until the end of the schedule, warm-up included; None: the trainer's total.
        schedule: cosine (arXiv:1608.03983) decays from the warm-up on; wsd (warm-up, stable, decay; arXiv:2404.06395)
            is constant and decays linearly at the end, so a run whose decay has not begun goes on with more steps at
            the same learning rate.
        decay_ratio: share of the steps that wsd decays over.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_steps: int | None = None
    schedule: Schedule = "cosine"
    decay_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"optimizer: learning_rate must be positive and finite, got learning_rate={self.learning_rate}"
            )
        check_not_negative("optimizer", "weight_decay", self.weight_decay)
        check_not_negative("optimizer", "warmup_steps", self.warmup_steps)
        check_fraction("optimizer", "beta1", self.beta1)
        check_fraction("optimizer", "beta2", self.beta2)
        check_choice("optimizer", "schedule", self.schedule, SCHEDULES)
        for name in ("min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer: {name} must be in [0, 1], got {name}={getattr(self, name)}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optimizer: decay_steps must be positive, got decay_steps={self.decay_steps}")


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` of fp32 weights, each update one pass over memory, clipping included.

    Of an MoE most weights are those of experts that a token does not use, so the update is a main part of its step.
    The state is torch's, and goes from one to the other.
    """

    _gradient_scale: Tensor | None = None

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)  # its state is then on the weights' device

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale gradients of this norm to `max_norm` at the most as the next update reads them; in memory they stay."""
        self._gradient_scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self._gradient_scale = self._gradient_scale, None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in weights]
            steps = [state["step"] for state in states]
            if steps:
                torch._foreach_add_(steps, 1)
            adamw_(
                weights,
                [p.grad for p in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                steps,
                learning_rate=float(group["lr"]),
                betas=group["betas"],
                epsilon=group["eps"],
                weight_decay=group["weight_decay"],
                gradient_scale=scale,
            )
        return loss

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


def clip_to_norm(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
    """Clip gradients whose norm is known; by our `AdamW` while it reads them, else in place."""
    if isinstance(optimizer, AdamW):
        optimizer.clip(norm, max_norm)
    else:
        torch.nn.utils.clip_grads_with_norm_(_weights(optimizer), max_norm, norm)


def clip_by_norm(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_` of all its weights; by our `AdamW` while it reads their gradients."""
    gradients = [p.grad for p in _weights(optimizer) if p.grad is not None]
    clip_to_norm(optimizer, torch.nn.utils.get_total_norm(gradients), max_norm)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig, scaled: bool = False) -> torch.optim.AdamW:
    """AdamW over the two groups: `AdamW` where all weights are fp32 on a GPU, torch's fused form for other GPU weights.

    A state loaded into it brings the moments; all settings stay those of `config` and of this device. After each step
    the biases of routers that are balanced by one are updated.

    Args:
        module: whose parameters are trained.
        config: settings.
        scaled: whether a gradient scaler (16-mixed) is used: it cannot clip under the fused form.
    """
    groups = weight_decay_groups(module, config.weight_decay)
    weights = [p for group in groups for p in group["params"]]
    fused = not scaled and bool(weights) and all(p.is_cuda and p.is_floating_point() for p in weights)
    ours = fused and all(p.dtype == torch.float32 and p.is_contiguous() for p in weights)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if ours and native.use_native("optimizer", "auto", "cuda"):
        optimizer: torch.optim.AdamW = AdamW(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=fused or None, **settings)
    optimizer._step_supports_amp_scaling = False  # or Lightning would refuse to clip
    optimizer.register_step_post_hook(lambda *_: update_biases(module))

    def keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        loaded = zip(state["param_groups"], optimizer.param_groups, strict=False)  # load_state_dict refuses others
        own = ("weight_decay", "betas", "fused", "foreach", "capturable")
        return {**state, "param_groups": [{**old, **{name: new[name] for name in own}} for old, new in loaded]}

    optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizer


def cosine(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """Share of the peak after the warm-up: half a cosine down to `min_lr_ratio`."""
    warmup = config.warmup_steps
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """Share of the peak after the warm-up: 1, and over the last `decay_ratio` of the steps a line to `min_lr_ratio`."""
    decay_steps = max(1.0, config.decay_ratio * total_steps)
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
    return 1 - (1 - config.min_lr_ratio) * progress


SCHEDULES: dict[str, Callable[[int, float, OptimizerConfig], float]] = {"cosine": cosine, "wsd": wsd}


class WarmupSchedule(LRScheduler):
    """A linear warm-up, then the schedule of `config`; constant after the warm-up if the total is unbounded.

    A state loaded into it brings the step. The learning rate there is that of `config` and of this run's total; if it
    is not the one that the saved run would have taken, that is logged once.

    Args:
        optimizer: all its groups get one learning rate.
        config: peak, warm-up and schedule; a change of its `learning_rate` takes effect at the next step.
        trainer_steps: total where `config.decay_steps` is None; may be infinite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, trainer_steps: float) -> None:
        self._config = config
        self._trainer_steps = trainer_steps
        super().__init__(optimizer)

    @property
    def total_steps(self) -> float:
        """Optimizer steps until the schedule's end."""
        return float(self._config.decay_steps or self._trainer_steps)

    def share_of_peak(self, step: int) -> float:
        """Learning rate of an optimizer step over the peak."""
        if step < self._config.warmup_steps:
            return (step + 1) / self._config.warmup_steps
        if math.isinf(self.total_steps):
            return 1.0
        return SCHEDULES[self._config.schedule](step, self.total_steps, self._config)

    @override
    def get_lr(self) -> list[float | torch.Tensor]:
        rate = self._config.learning_rate * self.share_of_peak(self.last_epoch)
        return [rate for _ in self.optimizer.param_groups]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step, and what a resume compares."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            "total_steps": self.total_steps if math.isinf(self.total_steps) else int(self.total_steps),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        before, after = float(state_dict["_last_lr"][0]), float(self._last_lr[0])
        if not math.isclose(before, after, rel_tol=1e-6):
            rank_zero_info(
                f"resume: the learning rate of step {self.last_epoch} goes from {before:.3g} to {after:.3g}: the "
                f"{self._config.schedule} schedule ends at step {self.total_steps:.0f}, it ended at step "
                f"{state_dict.get('total_steps', 'unknown')}; --model.optimizer.decay_steps sets the end, and "
                "--model.optimizer.schedule wsd has a constant phase that more steps do not change"
            )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, trainer_steps: float) -> WarmupSchedule:
    """The schedule over `config.decay_steps`, or over the trainer's steps."""
    return WarmupSchedule(optimizer, config, trainer_steps)
