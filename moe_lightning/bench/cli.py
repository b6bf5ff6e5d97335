"""The command line of the benchmarks: flags that they share, the settings they give, and the checks of both."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn

import torch
from rich.console import Console

from moe_lightning.bench.record import check_record_path
from moe_lightning.bench.roofline import Ceilings, Shape, measure_ceilings
from moe_lightning.bench.spread import noise
from moe_lightning.callbacks.trace import FOLDER, make_folder
from moe_lightning.ops import check_sinkhorn_arguments, native
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checks import check_choice, check_int, check_sizes
from moe_lightning.utils.memory import host_memory


class _RecordPath(argparse.Action):
    """Refuses a path that no record may be written to before anything is measured."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        check_record_path(parser.component, values)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Errors in one line, as all others of the project."""

    def __init__(self, command: str, description: str | None, **kwargs: Any) -> None:
        self.component = f"bench.{command}"
        prog = f"python -m moe_lightning.bench {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """For `bench.__main__` to print."""
        raise ValueError(f"{self.component}: {message}; see --help")

    def add_device(self) -> None:
        """--device."""
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=usual, help="cuda or cpu")

    def add_routers(self, strategies: Iterable[str], usual: str, usual_dtype: str) -> None:
        """Device, dtype, which routers and how they are set."""
        self.add_device()
        self.add_argument("--dtype", help=f"fp16, bf16 or fp32; default {usual_dtype} on cuda, fp32 on the CPU")
        self.add_argument("--strategy", nargs="+", default=[usual], help=", ".join(strategies))
        self.add_argument("--all_strategies", action="store_true")
        self.add_argument("--sinkhorn_iters", type=int, default=10)
        self.add_argument("--sinkhorn_temperature", type=float, default=1.0)
        self.add_argument("--skew_experts", type=int, default=0, help="this many experts get --skew_bias")
        self.add_argument("--skew_bias", type=float, default=2.0, help="in logits")
        self.set_defaults(strategies=tuple(strategies), usual_dtype=usual_dtype)

    def add_record(self) -> None:
        """--json."""
        self.add_argument("--json", action=_RecordPath, metavar="FILE", help="write the results as a record")

    def add_results(self, rounds: int) -> None:
        """How often to measure, and where results go."""
        text = "turns that each call takes; medians are over these"
        self.add_argument("--rounds", type=int, default=rounds, help=text)
        self.add_record()
        self.add_argument("--plot", metavar="FILE", help="draw them (.png, .svg, .pdf)")

    def add_trace(self) -> None:
        """--trace."""
        text = f"trace a few calls of every layer too, by torch.profiler; into {FOLDER} unless DIR is given"
        self.add_argument("--trace", nargs="?", const=FOLDER, metavar="DIR", help=text)

    def settings(self, flags: argparse.Namespace, backward: bool) -> Settings:
        """Checked; the flags get the dtype they did not have, and lose what is not the user's."""
        check_device(self.component, flags.device)
        flags.dtype = flags.dtype or (flags.usual_dtype if flags.device == "cuda" else "fp32")
        check_choice(self.component, "dtype", flags.dtype, DTYPES)
        strategies = flags.strategies if flags.all_strategies else tuple(dict.fromkeys(flags.strategy))
        del flags.strategies, flags.usual_dtype
        check_strategies(self.component, strategies, flags.device)
        settings = Settings(
            device=torch.device(flags.device, 0) if flags.device == "cuda" else torch.device("cpu"),
            dtype=DTYPES[flags.dtype],
            strategies=strategies,
            backward=backward,
            sinkhorn_iters=flags.sinkhorn_iters,
            sinkhorn_temperature=flags.sinkhorn_temperature,
            skew_experts=flags.skew_experts,
            skew_bias=flags.skew_bias,
            rounds=flags.rounds,
        )
        check_settings(self.component, settings)
        if vars(flags).get("trace"):
            make_folder(flags.trace)  # before anything is measured
        return settings


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


def measured_ceilings(settings: Settings, console: Console) -> Ceilings:
    """Measure and say them."""
    with console.status("measuring what this machine reaches"):
        ceilings = measure_ceilings(settings.device, settings.dtype)
    spread = ceilings.spread
    console.print(
        f"{settings.device_name}: copy {ceilings.copy / 1e9:,.1f} GB/s {spread['copy']}, "
        f"{settings.dtype_name} matmul {ceilings.matmul / 1e12:,.2f} TFLOP/s {spread['matmul']}"
    )
    if line := noise(spread):
        console.print(f"{line}; the floors are of the fastest of three")
    return ceilings
