"""Routing ops on the CPU against the torch calls that they replace: median time, and the ratio to native."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from moe_lightning.bench.baselines import (
    softmax_topk_renorm,
    sort_bincount_cumsum,
    sort_bincount_cumsum_only,
    topk_softmax,
)
from moe_lightning.bench.cli import Parser
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import medians, print_noise, with_spread
from moe_lightning.bench.timers import interleave
from moe_lightning.ops import build_index, select
from moe_lightning.utils.checks import check_sizes

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Variants = dict[str, Callable[[], Any]]


def _cases(logits_TE: Tensor, top_k: int) -> dict[str, Variants]:
    experts = logits_TE.shape[1]
    leaf_TE = logits_TE.clone().requires_grad_()
    ids_TK = select(logits_TE, top_k).expert_ids_TK
    ids_N = ids_TK.flatten().long()
    upstream_TK = torch.randn(ids_TK.shape)

    def both_ways(call: Callable[[Tensor, int], Any]) -> Callable[[], Any]:
        def run() -> None:
            weights_TK = call(leaf_TE, top_k)[0]
            torch.autograd.grad(weights_TK, leaf_TE, upstream_TK.to(weights_TK.dtype))

        return run

    def native(logits_TE: Tensor, top_k: int) -> Any:
        return select(logits_TE, top_k, "native")

    return {
        "select": {
            "native": lambda: native(logits_TE, top_k),
            "topk > softmax": lambda: topk_softmax(logits_TE, top_k),
            "softmax > topk > renorm": lambda: softmax_topk_renorm(logits_TE, top_k),
            "stable sort (reference)": lambda: select(logits_TE, top_k, "torch"),
        },
        "select, forward + backward": {
            "native": both_ways(native),
            "topk > softmax": both_ways(topk_softmax),
            "softmax > topk > renorm": both_ways(softmax_topk_renorm),
        },
        "index": {
            "native": lambda: build_index(ids_TK, experts, "native"),
            "argsort, bincount, cumsum": lambda: sort_bincount_cumsum_only(ids_N, experts),
            "argsort, bincount, cumsum, inverse": lambda: sort_bincount_cumsum(ids_N, experts),
        },
    }


def measure(flags: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Time every case at the given size, and at one token, where the host's own cost is all there is."""
    results = []
    with Progress(console=console, transient=True) as progress:
        for tokens in (flags.tokens, 1):
            torch.manual_seed(0)
            logits_TE = torch.randn(tokens, flags.num_experts).to(DTYPES[flags.dtype])
            for case, variants in _cases(logits_TE, flags.top_k).items():
                spread = interleave(variants, flags.rounds, flags.threads, progress)
                times = medians(spread)
                ratios = {name: round(us / times["native"], 2) for name, us in times.items()}
                result = {"case": case, "tokens": tokens, "median_us": times, "times_native": ratios}
                results.append(result | {"spread": spread})
    return results


def _table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("case", "tokens", "variant"):
        table.add_column(column)
    for column in ("median us", "x native"):
        table.add_column(column, justify="right")
    for result in results:
        head = (result["case"], str(result["tokens"]))
        for variant, us in result["median_us"].items():
            time = with_spread(f"{us:,.1f}", result["spread"][variant])
            table.add_row(*head, variant, time, f"{result['times_native'][variant]:.1f}")
            head = ("", "")
        table.add_section()
    return table


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record."""
    parser = Parser("ops", __doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--num_experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every variant")
    parser.add_rounds(25)
    parser.add_record()
    flags = parser.parse_args(arguments)
    check_sizes("bench.ops", tokens=flags.tokens, rounds=flags.rounds, threads=flags.threads)
    console = Console()
    results = measure(flags, console)
    shape = f"E={flags.num_experts} K={flags.top_k} {flags.dtype}"
    console.print(_table(results, f"{shape}, {flags.threads} thread(s)"))
    spreads = {
        f"{result['case']}, {result['tokens']} tokens, {variant}": us
        for result in results
        for variant, us in result["spread"].items()
    }
    print_noise(console, spreads)
    if flags.json:
        write_record(flags.json, "ops", {"settings": vars(flags), "cases": results})
