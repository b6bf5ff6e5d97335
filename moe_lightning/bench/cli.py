"""The command line of the benchmarks: flags that they share, the settings they give, and the checks of both."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from typing_extensions import override

from moe_lightning.bench.record import check_record_path
from moe_lightning.bench.roofline import Peaks, Shape, measure_peaks
from moe_lightning.bench.spread import noise
from moe_lightning.callbacks.trace import FOLDER, make_folder
from moe_lightning.ops import check_sinkhorn_arguments, native
from moe_lightning.routers import ROUTERS
from moe_lightning.utils import cli
from moe_lightning.utils.checks import check_choice, check_installed, check_int, check_sizes
from moe_lightning.utils.memory import host_memory

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DEVICES = ("cuda", "cpu")
PICTURES = (".png", ".svg", ".pdf")
#: Sizes of a layer and its batch, by default.
LAYER = {"tokens": 4096, "d_model": 4096, "num_experts": 64, "top_k": 2, "mlp_hidden_dim": 2048}


class _RecordPath(argparse.Action):
    """Refuses a path that no record may be written to before anything is measured."""

    @override
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        check_record_path(parser.component, values)
        setattr(namespace, self.dest, values)


class _PicturePath(argparse.Action):
    """Refuses a picture that cannot be drawn or written."""

    @override
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert isinstance(parser, Parser)
        if not str(values).endswith(PICTURES):
            raise ValueError(f"{parser.component}: --plot must end in {', '.join(PICTURES)}, got {values}")
        check_installed(f"{parser.component}: --plot", "plots", "matplotlib")
        setattr(namespace, self.dest, values)


class Parser(cli.Parser):
    """One command of the benchmarks; a flag that several commands have is called the same on each."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(f"bench.{command}", description, prog=f"python -m moe_lightning.bench {command}")

    def add_device(self) -> None:
        """--device."""
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=default, help="cuda or cpu")

    def add_routers(self, routers: Iterable[str], default: str, default_dtype: str) -> None:
        """Device, dtype, which routers and how they are set."""
        self.add_device()
        self.add_argument("--dtype", help=f"fp16, bf16 or fp32; default {default_dtype} on cuda, fp32 on the CPU")
        self.add_argument("--routers", nargs="+", default=[default], help=", ".join(routers))
        self.add_argument("--all_routers", action="store_true")
        self.add_argument("--sinkhorn_iters", type=int, default=10)
        self.add_argument("--sinkhorn_temperature", type=float, default=1.0)
        self.add_argument("--skew_experts", type=int, default=0, help="this many experts get --skew_bias")
        self.add_argument("--skew_bias", type=float, default=2.0, help="in logits")
        self._routers, self._default_dtype = tuple(routers), default_dtype

    def add_layer(self, several: bool = False) -> None:
        """Sizes of an MoE layer and of its batch; `several`: all but the experts' hidden size may be swept."""
        help_of = {
            "tokens": "per rank and pass",
            "num_experts": "over all ranks",
            "mlp_hidden_dim": "hidden size of an expert",
        }
        for name, default in LAYER.items():
            swept: dict[str, Any] = {"nargs": "+", "default": [default]} if several and name != "mlp_hidden_dim" else {}
            self.add_argument(f"--{name}", type=int, help=help_of.get(name), **{"default": default} | swept)

    def add_record(self) -> None:
        """--json."""
        self.add_argument("--json", action=_RecordPath, metavar="FILE", help="write the results as a record")

    def add_plot(self) -> None:
        """--plot."""
        self.add_argument(
            "--plot", action=_PicturePath, metavar="FILE", help=f"draw the results ({', '.join(PICTURES)})"
        )

    def add_rounds(self, default: int) -> None:
        """--rounds."""
        self.add_argument("--rounds", type=int, default=default, help="of each call; medians are over these")

    def add_results(self, rounds: int) -> None:
        """How often to measure, and where results go."""
        self.add_rounds(rounds)
        self.add_record()
        self.add_plot()

    def add_trace(self) -> None:
        """--trace."""
        text = f"trace a few calls of every layer too, by torch.profiler; into {FOLDER} unless DIR is given"
        self.add_argument("--trace", nargs="?", const=FOLDER, metavar="DIR", help=text)

    def settings(self, flags: argparse.Namespace, backward: bool) -> Settings:
        """Checked; the flags get the dtype that they did not have."""
        check_device(self.component, flags.device)
        flags.dtype = flags.dtype or (self._default_dtype if flags.device == "cuda" else "fp32")
        check_choice(self.component, "dtype", flags.dtype, DTYPES)
        routers = self._routers if flags.all_routers else tuple(dict.fromkeys(flags.routers))
        check_routers(self.component, routers, flags.device)
        settings = Settings(
            device=torch.device(flags.device, 0) if flags.device == "cuda" else torch.device("cpu"),
            dtype=DTYPES[flags.dtype],
            routers=routers,
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


@dataclass(frozen=True)
class Settings:
    """All that is the same for every shape of a run."""

    device: torch.device
    dtype: torch.dtype
    routers: tuple[str, ...]
    backward: bool
    sinkhorn_iters: int
    sinkhorn_temperature: float
    skew_experts: int
    skew_bias: float
    rounds: int

    def router_options(self, router: str) -> dict[str, Any]:
        """Keyword arguments of the router's class."""
        options: dict[str, Any] = {"skew_experts": self.skew_experts, "skew_bias": self.skew_bias}
        if router == "sinkhorn":
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


def check_routers(component: str, routers: tuple[str, ...], device: str) -> None:
    """Raise ValueError for an unknown name, or a router that would run its torch reference in place of its kernels."""
    for router in routers:
        check_choice(component, "router", router, ROUTERS)
    reason = native.missing(device)
    if "fused_select" in routers and reason:
        others = " ".join(name for name in ROUTERS if name != "fused_select")
        raise ValueError(f"{component}: fused_select needs its {device} kernels: {reason}; or --routers {others}")


def check_settings(component: str, settings: Settings) -> None:
    """Raise ValueError, naming the value, if one is out of range."""
    check_sinkhorn_arguments(component, settings.sinkhorn_iters, settings.sinkhorn_temperature, 0.0)
    if not math.isfinite(settings.skew_bias):
        raise ValueError(f"{component}: skew_bias must be finite, got skew_bias={settings.skew_bias}")
    check_int(component, "skew_experts", settings.skew_experts, 0)
    check_sizes(component, rounds=settings.rounds)


def shapes(component: str, settings: Settings, flags: Mapping[str, Any]) -> list[Shape]:
    """All combinations of the sizes, each one number or several, tokens fastest, each checked."""
    several = {name: value if isinstance(value, list) else [value] for name, value in flags.items() if name in LAYER}
    swept = []
    order = ("d_model", "num_experts", "top_k", "mlp_hidden_dim", "tokens")
    for d, e, k, f, t in product(*(several[name] for name in order)):
        for name, size in zip(order, (d, e, None, f, t), strict=True):
            if size is not None and not 1 <= size < 2**31:
                raise ValueError(
                    f"{component}: {name} must be in [1, 2147483647], got {name}={size}; give --{name} {LAYER[name]}"
                )
        if not 1 <= k <= e:
            remedy = "lower --top_k or raise --num_experts" if k > e else "give --top_k 2"
            raise ValueError(
                f"{component}: top_k must be in [1, num_experts], got top_k={k}, num_experts={e}; {remedy}"
            )
        if settings.skew_experts > e:
            raise ValueError(
                f"{component}: skew_experts must be in [0, num_experts], got skew_experts={settings.skew_experts}, "
                f"num_experts={e}; lower --skew_experts"
            )
        over = e > native.MAX_EXPERTS or k > native.MAX_TOP_K
        if "fused_select" in settings.routers and over:
            raise ValueError(
                f"{component}: fused_select takes num_experts <= {native.MAX_EXPERTS} and top_k <= "
                f"{native.MAX_TOP_K}, got num_experts={e}, top_k={k}; lower them or choose other --routers"
            )
        swept.append(Shape(t, d, e, k, f, settings.dtype.itemsize))
        _check_memory(component, swept[-1], settings.device)
    return swept


def _check_memory(component: str, shape: Shape, device: torch.device) -> None:
    """Raise ValueError unless tokens, rows and the gate fit, with their gradients and sums in fp32."""
    needs = 4 * shape.size * (shape.slots + shape.tokens) * (shape.d_model + shape.num_experts)
    needs += 4 * shape.size * shape.num_experts * shape.d_model
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().limit
    if needs > free:
        raise ValueError(
            f"{component}: the phases must fit in memory, got tokens={shape.tokens}, d_model={shape.d_model}, "
            f"num_experts={shape.num_experts}, top_k={shape.top_k}, which take {needs / 2**30:,.0f} GiB of "
            f"{free / 2**30:,.0f}; lower --tokens or --d_model"
        )


def measured_peaks(settings: Settings, console: Console) -> Peaks:
    """Measure and print them."""
    with console.status("measuring this machine's peaks"):
        peaks = measure_peaks(settings.device, settings.dtype)
    spread = peaks.spread
    console.print(
        f"{settings.device_name}: copy {peaks.copy / 1e9:,.1f} GB/s {spread['copy']}, "
        f"{settings.dtype_name} matmul {peaks.matmul / 1e12:,.2f} TFLOP/s {spread['matmul']}"
    )
    if line := noise(spread):
        console.print(f"{line}; the rooflines are of the fastest of three")
    return peaks
