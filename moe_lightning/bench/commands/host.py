"""What a call costs the host, piece by piece: a select without gradient at T = 4096, E = 64, K = 2.

Each piece in a loop that never waits for the device, short enough for the driver's queue; median over rounds. Some
pieces are parts of others: the op is the four allocations, the native call and the Python around them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lightning.bench import baselines
from moe_lightning.bench.cli import Parser, check_device
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, medians, print_noise, with_spread
from moe_lightning.ops import native, select
from moe_lightning.ops.library import is_plain

TOKENS, EXPERTS, TOP_K = 4096, 64, 2
CALLS, ROUNDS = 200, 25


def pieces(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name of a piece -> the call."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    logits_TE = torch.randn(TOKENS, EXPERTS, device=device).to(dtype)
    allocate, kernels = native.allocator(logits_TE), native.module(device.type)
    outputs = select(logits_TE, TOP_K, "native")
    place, logits, code = native.place(logits_TE), logits_TE.data_ptr(), native.DTYPE_CODES[dtype]
    weights, expert_ids, tokens_per_expert, invalid_rows = (output.data_ptr() for output in outputs)

    def call_native(_outputs: Any = outputs) -> None:  # which must live as long as their addresses are used
        kernels.select_forward(
            place, logits=logits, bias=0, selection_scores=0, mask=0, weights=weights, expert_ids=expert_ids,
            tokens_per_expert=tokens_per_expert, invalid_rows=invalid_rows, gap_counts=0, tokens=TOKENS,
            experts=EXPERTS, top_k=TOP_K, n_group=1, topk_group=1, dtype=code, score=0, renormalize=True,
            scaling_factor=1.0, row_stride=EXPERTS, threads=1,
        )  # fmt: skip

    both = allocate((2, TOKENS, TOP_K), (TOKENS * TOP_K, TOP_K, 1), torch.int32)
    return {
        "select": lambda: select(logits_TE, TOP_K, "native"),
        "  an allocation (of four)": lambda: allocate((TOKENS, TOP_K), (TOP_K, 1), torch.int32),
        "  the native call: bindings and launch": call_native,
        "  whether it is intercepted": lambda: is_plain(logits_TE),
        "  device and stream": lambda: native.place(logits_TE),
        "for comparison: torch.empty": lambda: torch.empty((TOKENS, TOP_K), dtype=torch.int32, device=device),
        "for comparison: two views (unbind)": lambda: both.unbind(0),
        "for comparison: topk > softmax in torch": lambda: baselines.topk_softmax(logits_TE, TOP_K),
    }


def measure(call: Callable[[], Any], device: torch.device) -> Spread:
    """Microseconds per call on the host."""
    samples = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        call()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append(1e6 * (time.perf_counter() - began) / CALLS)
    return Spread.of(samples)


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record."""
    parser = Parser("host", __doc__)
    parser.add_device()
    parser.add_record()
    flags = parser.parse_args(arguments)
    check_device("bench.host", flags.device)
    if reason := native.missing(flags.device):
        raise ValueError(f"bench.host: needs the {flags.device} kernels: {reason}")
    torch.set_num_threads(1)
    device = torch.device(flags.device)
    console = Console()
    calls = pieces(device)
    rows = {name: measure(call, device) for name, call in track(calls.items(), console=console, transient=True)}
    table = Table(title=f"host time of a call, {TOKENS} x {EXPERTS}, top-{TOP_K}, {flags.device}", title_justify="left")
    table.add_column("piece")
    table.add_column("us", justify="right")
    for name, us in rows.items():
        table.add_row(name, with_spread(f"{us.median:.2f}", us))
    console.print(table)
    print_noise(console, rows)
    if flags.json:
        spread = {name.strip(): us for name, us in rows.items()}
        settings = vars(flags) | {"calls": CALLS, "rounds": ROUNDS}
        write_record(flags.json, "host", {"settings": settings, "us": medians(spread), "spread": spread})
