"""The update of AdamW (arXiv:1711.05101) in one pass over memory, clipping included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.ops import native


# ---- torch reference -------------------------------------------------------------------------------------
def _reference(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_scale: Tensor | None,
) -> None:
    beta1, beta2 = betas
    for weight, gradient, mean, square, step in zip(weights, gradients, means, squares, steps, strict=True):
        scaled = gradient if gradient_scale is None else gradient * gradient_scale
        weight.mul_(1 - learning_rate * weight_decay)
        mean.mul_(beta1).add_(scaled, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
        step_size = learning_rate / (1 - beta1 ** step.double())
        correction = (1 - beta2 ** step.double()).sqrt()
        weight.sub_(step_size.float() * mean / (square.sqrt() / correction.float() + epsilon))


# ---- native call -----------------------------------------------------------------------------------------
def _call(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_scale: Tensor | None,
) -> None:
    gradients = [gradient.contiguous() for gradient in gradients]
    every = zip(weights, gradients, means, squares, steps, strict=True)
    rows = torch.tensor([[*(t.data_ptr() for t in tensors), tensors[0].numel()] for tensors in every])
    native.module("cuda").adamw(
        native.place(weights[0]), tensors=rows.data_ptr(), gradient_scale=native.pointer(gradient_scale),
        size=len(weights), learning_rate=learning_rate, beta1=betas[0], beta2=betas[1], epsilon=epsilon,
        weight_decay=weight_decay,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*weights, *means, *squares])


# ---- public ----------------------------------------------------------------------------------------------
@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_scale: Tensor | None = None,
) -> None:
    """Update weights and moments in place; without waiting for the device, and with the same bits each time.

    Args:
        weights: fp32, contiguous, on one device.
        gradients: as large; only read.
        means: first moments, as large.
        squares: second moments, as large.
        steps: fp32 scalars: which update of the weight this is, from 1 on.
        learning_rate: of this update.
        betas: decay of the moments.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled: times the learning rate.
        gradient_scale: fp32 scalar on the device that multiplies the gradients, such as to clip them; None: 1.

    Raises:
        ValueError: tensors of another dtype, size, order in memory or device.
    """
    if not weights:
        return
    device = weights[0].device
    for weight, *others in zip(weights, means, squares, strict=True):
        for tensor in (weight, *others):
            if (tensor.dtype, tensor.device, tensor.shape) != (torch.float32, device, weight.shape) or not (
                tensor.is_contiguous()
            ):
                raise ValueError(
                    f"ops.adamw: weights and moments must be fp32, contiguous, on one device and of one shape, got "
                    f"{tensor.dtype}, shape={tuple(tensor.shape)} beside {tuple(weight.shape)}, {tensor.device}"
                )
    for weight, gradient, step in zip(weights, gradients, steps, strict=True):
        if (gradient.dtype, gradient.device, gradient.shape) != (torch.float32, device, weight.shape):
            raise ValueError(
                f"ops.adamw: a gradient must be fp32 and of its weight's shape and device, got {gradient.dtype}, "
                f"shape={tuple(gradient.shape)} beside {tuple(weight.shape)}, {gradient.device}"
            )
        if (step.dtype, step.device, step.numel()) != (torch.float32, device, 1):
            raise ValueError(
                f"ops.adamw: a step must be one fp32 number on {device}, got {step.dtype}, {step.device}, "
                f"{step.numel()} numbers"
            )
    update = _call if device.type == "cuda" and native.use_native("ops.adamw", "auto", "cuda") else _reference
    update(weights, gradients, means, squares, steps, learning_rate, betas, epsilon, weight_decay, gradient_scale)
