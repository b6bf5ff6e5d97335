"""What the RouterTiming callback itself costs: `python -m moe_lightning.bench timing`.

One real training run, its logging intervals alternately with the callback and without, so that both
see the same machine.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from moe_lightning.bench.cli import Parser, check_device
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, as_row, print_noise, with_spread
from moe_lightning.callbacks import RouterTiming
from moe_lightning.training.modules import DecoderMoEModule
from moe_lightning.utils.checks import check_sizes


class _OnAndOff(L.Callback):
    """Detaches the clocks in every second logging interval, and times the intervals."""

    def __init__(self, timing: RouterTiming, interval: int, device: torch.device) -> None:
        self.timing, self.interval, self.device = timing, interval, device
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.interval:
            return
        self._synchronize()
        if batch_idx:
            self.seconds.append(time.perf_counter() - self._began)
        if (batch_idx // self.interval) % 2:
            self.timing.teardown(trainer, pl_module, "fit")
        else:
            self.timing.setup(trainer, pl_module, "fit")
        self._began = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    module: DecoderMoEModule, batch: torch.Tensor, intervals: int, interval: int, device: torch.device, precision: Any
) -> dict[str, Any]:
    """Seconds of a step with the callback on and off, over interleaved intervals, and the cost in percent."""
    timing = RouterTiming()
    switch = _OnAndOff(timing, interval, device)
    steps = (2 * intervals + 2) * interval + 1  # two intervals to warm up, one more step to close the last
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_steps=steps,
            max_epochs=1,
            log_every_n_steps=interval,
            logger=TensorBoardLogger(folder, name=""),
            callbacks=[timing, switch],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    on, off = switch.seconds[2::2], switch.seconds[3::2]
    return compare(on, off, interval)


def compare(on: list[float], off: list[float], interval: int) -> dict[str, Any]:
    """Of intervals of so many steps, in seconds, alternately on and off; the cost is of each pair."""
    cost = Spread.of([a / b for a, b in zip(on, off, strict=True)]).scaled(100, -1)
    times = {"step_on_s": Spread.of(on).scaled(1 / interval), "step_off_s": Spread.of(off).scaled(1 / interval)}
    shares = {"cost_percent": cost.median, "cost_percent_low": cost.q1, "cost_percent_high": cost.q3}
    return as_row(times) | shares | {"intervals": cost.rounds}


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record."""
    parser = Parser("timing", __doc__)
    parser.add_device()
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--mlp_hidden_dim", type=int, default=256)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--intervals", type=int, default=15, help="logging intervals with and without, each")
    parser.add_argument("--interval", type=int, default=10, help="steps in a logging interval")
    parser.add_record()
    flags = parser.parse_args(arguments)
    check_device("bench.timing", flags.device)
    check_sizes("bench.timing", intervals=flags.intervals, interval=flags.interval)
    L.seed_everything(0, verbose=False)
    module = DecoderMoEModule(
        320, flags.d_model, flags.n_heads, flags.n_layers, flags.mlp_hidden_dim, flags.num_experts, flags.top_k
    )
    batch = torch.randint(0, 256, (flags.batch_size, flags.seq_len + 1))
    result = measure(module, batch, flags.intervals, flags.interval, torch.device(flags.device), flags.precision)
    table = Table(title="RouterTiming, on and off")
    for column in ("step on, ms", "step off, ms", "cost, % (median)", "quartiles", "pairs"):
        table.add_column(column, justify="right")
    table.add_row(
        with_spread(f"{1e3 * result['step_on_s']:.2f}", result["spread"]["step_on_s"]),
        with_spread(f"{1e3 * result['step_off_s']:.2f}", result["spread"]["step_off_s"]),
        f"{result['cost_percent']:+.2f}",
        f"{result['cost_percent_low']:+.2f} to {result['cost_percent_high']:+.2f}",
        str(result["intervals"]),
    )
    console = Console()
    console.print(table)
    print_noise(console, result["spread"])
    if flags.json:
        write_record(flags.json, "timing", {"settings": vars(flags), **result})
