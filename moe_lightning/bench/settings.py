"""What a user asks a benchmark of layers for, and the checks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from moe_lightning.bench.accounting import Shape
from moe_lightning.ops import check_sinkhorn_arguments, native
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_choice, check_int, check_sizes
from moe_lightning.utils.memory import host_memory

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Settings:
    """All that is the same for every shape of a run."""

    device: torch.device
    dtype: torch.dtype
    strategies: tuple[str, ...]
    backward: bool
    sinkhorn_iters: int
    sinkhorn_temperature: float
    skew_experts: int
    skew_bias: float
    rounds: int

    def router_options(self, strategy: str) -> dict[str, Any]:
        """Keyword arguments of the strategy's router."""
        options: dict[str, Any] = {"skew_experts": self.skew_experts, "skew_bias": self.skew_bias}
        if strategy == "sinkhorn":
            options |= {"iterations": self.sinkhorn_iters, "temperature": self.sinkhorn_temperature}
        return options

    @property
    def dtype_name(self) -> str:
        """As the flag has it."""
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    @property
    def device_name(self) -> str:
        """The GPU's name, or the CPU with its threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def check_device(component: str, device: str) -> None:
    """Raise ValueError unless torch can use it."""
    check_choice(component, "device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{component}: device=cuda needs a GPU, torch sees none; use --device cpu")


def check_strategies(component: str, strategies: tuple[str, ...], device: str) -> None:
    """Raise ValueError for an unknown name, or a strategy that would measure its stand-in."""
    for strategy in strategies:
        check_choice(component, "strategy", strategy, ROUTERS)
    reason = native.missing(device)
    if "fused_select" in strategies and reason:
        others = " ".join(name for name in ROUTERS if name != "fused_select")
        raise ValueError(f"{component}: fused_select needs its {device} kernels: {reason}; or --strategy {others}")


def check_settings(component: str, settings: Settings) -> None:
    """Raise ValueError, naming the value, if one is out of range."""
    check_sinkhorn_arguments(component, settings.sinkhorn_iters, settings.sinkhorn_temperature, 0.0)
    if not math.isfinite(settings.skew_bias):
        raise ValueError(f"{component}: skew_bias must be finite, got skew_bias={settings.skew_bias}")
    check_int(component, "skew_experts", settings.skew_experts, 0)
    check_sizes(component, rounds=settings.rounds)


def shapes(
    component: str,
    tokens: list[int],
    d_model: list[int],
    experts: list[int],
    top_k: list[int],
    hidden_dim: int,
    settings: Settings,
) -> list[Shape]:
    """All combinations, tokens fastest, each checked."""
    found = []
    for width, e, k, t in product(d_model, experts, top_k, tokens):
        for name, size, usual in (
            ("tokens", t, 4096),
            ("d_model", width, 4096),
            ("experts", e, 64),
            ("hidden_dim", hidden_dim, 2048),
        ):
            if not 1 <= size < 2**31:
                raise ValueError(
                    f"{component}: {name} must be in [1, 2147483647], got {name}={size}; give --{name} {usual}"
                )
        if not 1 <= k <= e:
            way_out = "lower --top_k or raise --experts" if k > e else "give --top_k 2"
            raise ValueError(f"{component}: top_k must be in [1, experts], got top_k={k}, experts={e}; {way_out}")
        if settings.skew_experts > e:
            raise ValueError(
                f"{component}: skew_experts must be in [0, experts], got skew_experts={settings.skew_experts}, "
                f"experts={e}; lower --skew_experts"
            )
        over = e > native.MAX_EXPERTS or k > native.MAX_TOP_K
        if "fused_select" in settings.strategies and over:
            raise ValueError(
                f"{component}: fused_select takes experts <= {native.MAX_EXPERTS} and top_k <= {native.MAX_TOP_K}, "
                f"got experts={e}, top_k={k}; lower them or choose another --strategy"
            )
        found.append(Shape(t, width, e, k, hidden_dim, settings.dtype.itemsize))
        _check_memory(component, found[-1], settings.device)
    return found


def _check_memory(component: str, shape: Shape, device: torch.device) -> None:
    """Raise ValueError unless tokens, rows and the gate fit, with their gradients and sums in fp32."""
    needs = 4 * shape.size * (shape.slots + shape.tokens) * (shape.d_model + shape.experts)
    needs += 4 * shape.size * shape.experts * shape.d_model
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().limit
    if needs > free:
        raise ValueError(
            f"{component}: the phases must fit in memory, got tokens={shape.tokens}, d_model={shape.d_model}, "
            f"experts={shape.experts}, top_k={shape.top_k}, which take {needs / 2**30:,.0f} GiB of "
            f"{free / 2**30:,.0f}; lower --tokens or --d_model"
        )
