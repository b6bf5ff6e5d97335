"""The link between the ranks of torchrun: `torchrun --nproc_per_node 2 -m moe_lightning.bench link`.

Each size is sent by rank 0 to rank 1, back, both ways at once, and in an all_to_all without a rank's own part.
NCCL_P2P_DISABLE=1 makes the link host-staged, about as fast as PCIe.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_lightning.bench.cli import Parser, check_device
from moe_lightning.bench.ep.ranks import measure, ranks
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import Spread, print_noise, with_spread
from moe_lightning.utils.checks import check_sizes

WAYS = ("0 to 1", "1 to 0", "both", "all_to_all")


def link_kind(device: torch.device) -> str:
    """NVLink or PCIe (ranks reach each other's memory), or host-staged."""
    if device.type == "cpu":
        return "host memory (gloo)"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "host-staged (NCCL_P2P_DISABLE=1)"
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    if not all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        return "host-staged (no peer-to-peer access)"
    return "NVLink" if _has_nvlink(device.index) else "PCIe, peer to peer"


def _has_nvlink(index: int) -> bool:
    try:
        import pynvml
    except ImportError:
        return torch.cuda.get_device_capability(index) >= (8, 0) and "PCIe" not in torch.cuda.get_device_name(index)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, 0))
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()


def bandwidth(bytes_to_others: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """An all_to_all in which each rank sends so many bytes to the others together, nothing to itself."""
    world, rank = dist.get_world_size(), dist.get_rank()
    each = max(1, bytes_to_others // (world - 1))
    splits = [0 if r == rank else each for r in range(world)]
    sent = torch.ones(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    spread = measure({"": lambda: dist.all_to_all_single(received, sent, splits, splits)}, rounds, device)[""]
    return transferred(sum(splits), spread)


def transferred(sent: int, us: Spread) -> dict[str, Any]:
    """Bytes that a rank sends, the microseconds of that, and GB/s of that direction alone, whatever comes meanwhile."""
    return {"bytes": sent, "us": us.median, "gb_per_s": sent / us.median / 1e3, "spread": {"us": us}}


def _measure(size: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """GB/s of one direction, whatever goes the other way."""
    rank = dist.get_rank()
    sent, received = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    splits = [0, size] if rank == 0 else [size, 0]

    def point_to_point(sends: bool, receives: bool) -> Callable[[], None]:
        def call() -> None:
            operations = []
            if sends:
                operations.append(dist.P2POp(dist.isend, sent, 1 - rank))
            if receives:
                operations.append(dist.P2POp(dist.irecv, received, 1 - rank))
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        return call

    calls = {
        "0 to 1": point_to_point(rank == 0, rank == 1),
        "1 to 0": point_to_point(rank == 1, rank == 0),
        "both": point_to_point(True, True),
        "all_to_all": lambda: dist.all_to_all_single(received, sent, splits, splits),
    }
    times = measure(calls, rounds, device)
    return [{"way": way, **transferred(size, us)} for way, us in times.items()]


def _table(rows: list[dict[str, Any]], kind: str) -> Table:
    table = Table(title=f"{kind}: GB/s per direction (us)", title_justify="left")
    table.add_column("KiB", justify="right")
    for way in WAYS:
        table.add_column(way, justify="right")
    for size in dict.fromkeys(row["bytes"] for row in rows):
        own = {row["way"]: row for row in rows if row["bytes"] == size}
        times = {way: with_spread(f"{own[way]['us']:,.1f}", own[way]["spread"]["us"]) for way in WAYS}
        cells = (f"{own[way]['gb_per_s']:,.2f} ({times[way]})" for way in WAYS)
        table.add_row(f"{size / 1024:,.0f}", *cells)
    return table


def main(arguments: list[str]) -> None:
    """Parse flags, measure; rank zero prints, records, draws."""
    parser = Parser("link", __doc__)
    parser.add_device()
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[4 * 4**i for i in range(9)], help="4 to 262144")
    parser.add_results(rounds=11)
    flags = parser.parse_args(arguments)
    check_device("bench.link", flags.device)
    check_sizes("bench.link", rounds=flags.rounds, **{f"kilobytes[{i}]": k for i, k in enumerate(flags.kilobytes)})
    with ranks("bench.link", "nccl" if flags.device == "cuda" else "gloo", flags.device) as device:
        if dist.get_world_size() != 2:
            raise ValueError(f"bench.link: measures a pair, got {dist.get_world_size()} ranks; --nproc_per_node 2")
        leads, kind = dist.get_rank() == 0, link_kind(device)
        console = Console(width=130, quiet=not leads)
        sizes = track(flags.kilobytes, "sizes", console=console, transient=True)
        rows = [row for kilobytes in sizes for row in _measure(1024 * kilobytes, flags.rounds, device)]
    console.print(_table(rows, kind))
    spreads = {f"{row['way']}, {row['bytes'] / 1024:,.0f} KiB": row["spread"]["us"] for row in rows}
    print_noise(console, spreads)
    if leads and flags.json:
        write_record(flags.json, "link", {"settings": vars(flags), "kind": kind, "rows": rows})
    if leads and flags.plot:
        from moe_lightning.bench import plots

        plots.save(plots.bandwidth(rows, kind), flags.plot)
