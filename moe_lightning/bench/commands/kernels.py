"""Every CUDA kernel against the torch calls that it replaces, at sizes of real models: time, roofline, launches.

Columns as in docs/benchmarks.md. `torch` rows are what one writes today (bench/baselines.py); a ratio over 1 is how
many times the kernel is faster, in CUDA graphs with a warm cache.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from moe_lightning.bench import baselines
from moe_lightning.bench.calls import CallFactory, backward_factory, forward_factory
from moe_lightning.bench.cli import Parser
from moe_lightning.bench.gpu_timers import measure_on_gpu, side_stream
from moe_lightning.bench.record import write_record
from moe_lightning.bench.roofline import Peaks, measure_peaks
from moe_lightning.bench.router.table import MEASURED, cells
from moe_lightning.bench.spread import as_row, print_noise
from moe_lightning.ops import build_index, native, permute, select, sinkhorn, unpermute
from moe_lightning.ops.select import GAP_BINS
from moe_lightning.utils.checks import check_sizes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SELECT_SIZES = ((4096, 64, 2), (131072, 64, 2), (4096, 128, 8), (16384, 256, 8))  # tokens, experts, top_k
#: tokens, experts, top_k, n_group, topk_group
BIASED_SIZES = ((4096, 256, 8, 1, 1), (16384, 256, 8, 1, 1), (16384, 256, 8, 8, 4), (8192, 896, 16, 1, 1))
SINKHORN_SIZES = ((4096, 64, 1), (4096, 64, 10), (16384, 256, 10))  # tokens, experts, iterations
ROUTE = (4096, 4096, 64, 2)  # tokens, d_model, experts, top_k
COLUMNS = {**MEASURED, "% of copy": "copy_share", "x": "faster"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work at one size, the kernel first; bytes that must be read and written."""

    name: str
    size: str
    factories: dict[str, CallFactory]
    reads: int
    writes: int


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    size = dtype.itemsize

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    def both(calls: dict[str, Callable[..., Any]], *inputs: Any) -> dict[str, CallFactory]:
        return {name: forward_factory(call, inputs) for name, call in calls.items()}

    def backward(calls: dict[str, Callable[..., Any]], *inputs: Any) -> dict[str, CallFactory]:
        return {name: backward_factory(call, inputs, generator) for name, call in calls.items()}

    for tokens, experts, k in SELECT_SIZES:
        logits_TE, shape = random(tokens, experts), f"{tokens} x {experts}, top-{k}"
        reads, writes = tokens * experts * size, 8 * tokens * k + 4 * experts
        calls: dict[str, Callable[..., Any]] = {
            "select": lambda logits_TE, k=k: select(logits_TE, k, "native"),
            "torch: topk > softmax": lambda logits_TE, k=k: baselines.topk_softmax(logits_TE, k),
            "torch: softmax > topk > renorm": lambda logits_TE, k=k: baselines.softmax_topk_renorm(logits_TE, k),
        }
        yield Case("select", shape, both(calls, logits_TE), reads, writes)
        weights = {name: lambda logits_TE, call=call: call(logits_TE)[0] for name, call in calls.items()}
        leaf_TE = logits_TE.clone().requires_grad_()
        yield Case("select backward", shape, backward(weights, leaf_TE), 12 * tokens * k, tokens * experts * size)
        yield Case(
            "select + index",
            shape,
            both(_select_and_index(experts, k), logits_TE),
            reads,
            writes + 8 * tokens * k + 4 * (experts + 1),
        )

    for tokens, experts, k, n_group, topk_group in BIASED_SIZES:
        logits_TE, bias_E = random(tokens, experts), torch.randn(experts, device=device, generator=generator) / 20
        gap_counts_BE = torch.zeros(GAP_BINS, experts, device=device)
        groups: dict[str, Any] = {"n_group": n_group, "topk_group": topk_group}
        calls = {
            "select": lambda logits_TE, bias_E, k=k, options=groups: select(
                logits_TE, k, "native", score="sigmoid", bias_E=bias_E, **options
            ),
            "torch: sigmoid + bias > topk > renorm": lambda logits_TE, bias_E, k=k, options=groups: (
                baselines.biased_topk(logits_TE, bias_E, k, **options)
            ),
        }
        shape = f"{tokens} x {experts}, top-{k}" + (f", {topk_group} of {n_group} groups" if n_group > 1 else "")
        reads, writes = tokens * experts * size + 4 * experts, 8 * tokens * k + 4 * experts
        yield Case("select, sigmoid + bias", shape, both(calls, logits_TE, bias_E), reads, writes)
        if n_group > 1:
            continue
        counting = lambda logits_TE, bias_E, counts=gap_counts_BE, k=k: select(  # noqa: E731
            logits_TE, k, "native", score="sigmoid", bias_E=bias_E, gap_counts_BE=counts
        )
        read_and_written = gap_counts_BE.nbytes
        yield Case(
            "select, sigmoid + bias, gaps counted",
            shape,
            both({"select": counting}, logits_TE, bias_E),
            reads + read_and_written,
            writes + read_and_written,
        )

    for tokens, experts, iterations in SINKHORN_SIZES:
        calls = {
            "sinkhorn": lambda logits_TE, n=iterations: sinkhorn(logits_TE, n),
            "torch: loop": lambda logits_TE, n=iterations: baselines.sinkhorn_loop(logits_TE, n),
        }
        shape = f"{tokens} x {experts}, {iterations} iteration{'s' if iterations > 1 else ''}"
        reads = tokens * experts * size
        yield Case("sinkhorn", shape, both(calls, random(tokens, experts)), reads, tokens * experts * 4)

    tokens, width, experts, k = ROUTE
    shape = f"{tokens} x {width}, {experts} experts, top-{k}"
    x_TD, weight_ED = random(tokens, width), random(experts, width) * 0.02
    logits_TE = torch.nn.functional.linear(x_TD, weight_ED)
    selection = select(logits_TE, k)
    index = build_index(selection.expert_ids_TK, experts)
    rows_ND = permute(x_TD, index, k)
    slots, reads = tokens * k, (tokens + experts) * width * size
    logits = tokens * experts * size
    written = logits + 16 * slots + 4 * experts + 4 * (experts + 1)  # weights, ids, both orders; counts, offsets
    yield Case("gate", shape, both({"cuBLAS": torch.nn.functional.linear}, x_TD, weight_ED), reads, logits)
    without_rows, with_rows = _routes(experts, k)
    yield Case("route without rows", shape, both(without_rows, x_TD, weight_ED), reads, written)
    yield Case("route with rows", shape, both(with_rows, x_TD, weight_ED), reads, written + slots * width * size)

    reads, writes = tokens * width * size + 4 * slots, slots * width * size
    calls = {
        "permute": lambda x_TD, index: permute(x_TD, index, k),
        "torch: x[perm // K]": lambda x_TD, index: baselines.gather_rows(x_TD, index.perm_N, k),
    }
    yield Case("permute", shape, both(calls, x_TD, index), reads, writes)
    yield Case("permute backward", shape, backward(calls, x_TD.requires_grad_(), index), writes, reads)
    calls = {
        "unpermute": unpermute,
        "torch: rows[inverse], sum": lambda rows_ND, weights_TK, index: baselines.weighted_sum(
            rows_ND, weights_TK, index.inverse_perm_N
        ),
    }
    inputs = rows_ND.detach(), selection.weights_TK, index
    yield Case("unpermute", shape, both(calls, *inputs), writes + 8 * slots, tokens * width * size)
    leaves = rows_ND.detach().requires_grad_(), selection.weights_TK.clone().requires_grad_(), index
    backward_reads = writes + tokens * width * size + 8 * slots
    yield Case("unpermute backward", shape, backward(calls, *leaves), backward_reads, writes + 4 * slots)


def _select_and_index(experts: int, k: int) -> dict[str, Callable[..., Any]]:
    def ours(logits_TE: Tensor) -> Any:
        selection = select(logits_TE, k, "native")
        return selection, build_index(selection.expert_ids_TK, experts, "native")

    def theirs(logits_TE: Tensor) -> Any:
        weights_TK, ids_TK = baselines.topk_softmax(logits_TE, k)
        return weights_TK, baselines.sort_scatter(ids_TK, experts)

    return {"select, index": ours, "torch: topk > softmax, sort": theirs}


def _routes(experts: int, k: int) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    selecting = _select_and_index(experts, k)

    def ours(x_TD: Tensor, weight_ED: Tensor) -> Any:
        return selecting["select, index"](torch.nn.functional.linear(x_TD, weight_ED))

    def theirs(x_TD: Tensor, weight_ED: Tensor) -> Any:
        return selecting["torch: topk > softmax, sort"](torch.nn.functional.linear(x_TD, weight_ED))

    def ours_with_rows(x_TD: Tensor, weight_ED: Tensor) -> Any:
        return permute(x_TD, ours(x_TD, weight_ED)[1], k)

    def theirs_with_rows(x_TD: Tensor, weight_ED: Tensor) -> Any:
        return baselines.gather_rows(x_TD, theirs(x_TD, weight_ED)[1][1], k)

    return (
        {"gate, select, index": ours, "torch": theirs},
        {"gate, select, index, permute": ours_with_rows, "torch": theirs_with_rows},
    )


def run(dtype: torch.dtype, rounds: int, peaks: Peaks, progress: Progress) -> list[dict[str, Any]]:
    """Measure every case; one row per variant."""
    device, rows = torch.device("cuda", 0), []
    with side_stream(device):
        for case in _cases(dtype, device):
            reads = dict.fromkeys(case.factories, case.reads)
            times = measure_on_gpu(case.factories, reads, device, rounds, progress)
            first = next(iter(times.values()))["graph_us"]
            first_us = first and first.median
            total = case.reads + case.writes
            roofline_us = 1e6 * total / peaks.copy
            for variant, measured in times.items():
                row = as_row(measured)
                graph_us = row["graph_us"]
                rows.append(
                    {"case": case.name, "size": case.size, "variant": variant, **row, "bytes": total}
                    | {"roofline_us": roofline_us, "copy_share": graph_us and roofline_us / graph_us}
                    | {"faster": graph_us and first_us and graph_us / first_us}
                )
    return rows


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("case", "size", "variant"):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in rows:
        head = (row["case"], row["size"])
        if last not in (None, head):
            table.add_section()
        table.add_row(*(("", "") if last == head else head), escape(row["variant"]), *cells(row, COLUMNS))
        last = head
    return table


def main(arguments: list[str]) -> None:
    """Parse flags, measure, print, record."""
    parser = Parser("kernels", __doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_rounds(25)
    parser.add_record()
    flags = parser.parse_args(arguments)
    check_sizes("bench.kernels", rounds=flags.rounds)
    if not torch.cuda.is_available():
        raise ValueError("bench.kernels: needs a CUDA device, found none; on a CPU, use `bench ops`")
    if reason := native.missing("cuda"):
        raise ValueError(f"bench.kernels: needs the CUDA kernels: {reason}")
    console = Console(width=215)
    peaks = measure_peaks(torch.device("cuda", 0), DTYPES[flags.dtype])
    with Progress(console=console, transient=True) as progress:
        rows = run(DTYPES[flags.dtype], flags.rounds, peaks, progress)
    name = torch.cuda.get_device_name(0)
    console.print(_table(rows, f"{flags.dtype}, {name}, copy {peaks.copy / 1e9:,.0f} GB/s"))
    spreads = {
        f"{row['case']}, {row['size']}, {row['variant']}, {key[:-3]}": us
        for row in rows
        for key, us in row["spread"].items()
    }
    print_noise(console, spreads)
    if flags.json:
        write_record(
            flags.json,
            "kernels",
            {"settings": vars(flags), "peaks": vars(peaks), "rows": rows},
        )
