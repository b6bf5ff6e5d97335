"""An expert-parallel layer on more ranks: `python -m moe_lightning.bench scale --ep EP.json --link LINK.json`.

A cost model is fitted to records of `bench ep` and `bench link`, compared with them and with records of other numbers
of ranks that it was not fitted to (--held_out), and evaluated for more ranks with as many experts and tokens each, a
slower network between nodes, skew and chunks. It gives the fastest router and number of chunks.

Legend: W ranks, n chunks, N slots of a rank, D d_model. Times in microseconds, of the slowest rank.

A layer is: route, exchange the counts, then a pipeline of two resources. The link carries n chunks of the dispatch, in
turn, and each chunk of the combine when it is computed; the experts compute each chunk, with its share of the local
rows, when it has arrived. Chunking then has an overhead per layer and one per chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_lightning.bench.cli import Parser
from moe_lightning.bench.record import write_record
from moe_lightning.bench.spread import TOO_NOISY, Spread, with_spread
from moe_lightning.utils.checks import check_int, check_positive
from moe_lightning.utils.provenance import current_names

#: A prediction further than this from the measurement is reported.
AGREES = 0.15
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MEASURED = ("T_logit", "T_select", "T_pack", "T_comm", "T_comp", "T_seq", "rank_max_over_mean")


@dataclass(frozen=True)
class Link:
    """Time of a message: a fixed part, and its bytes over the bandwidth."""

    latency_us: float
    gb_per_s: float

    def us(self, sent: float) -> float:
        """Of so many bytes; nothing for none."""
        return self.latency_us + sent / (1e3 * self.gb_per_s) if sent > 0 else 0.0


@dataclass(frozen=True)
class Cluster:
    """Nodes of `node` ranks each, joined inside by one link and outside by another."""

    node: int
    inside: Link
    outside: Link

    def exchange_us(self, rows_bytes: float, ranks: int) -> float:
        """One direction in which each rank sends `rows_bytes`, spread evenly over all ranks; its own part stays."""
        near = min(ranks, self.node)
        both = (
            self.inside.us(rows_bytes * (near - 1) / ranks),
            self.outside.us(rows_bytes * (ranks - near) / ranks),
        )
        return max(both)  # the two links work at the same time


@dataclass(frozen=True)
class Layer:
    """One router, as fitted: what does not depend on the number of ranks."""

    router: str
    rows_bytes: float
    """Of N rows of D."""
    route_us: float
    count_exchange_us: float
    """The exchange of token counts between the ranks."""
    compute_us: float
    """Experts and unpacking of N rows, at an even load."""
    chunking_us: float
    """Overhead of chunking, per layer."""
    per_chunk_us: float
    """Overhead of chunking, per chunk."""
    rank_skew: float
    """Load of the fullest rank over the mean, as measured."""

    def predict(self, cluster: Cluster, ranks: int, chunks: int, skew: float) -> dict[str, float]:
        """T_comm, T_seq, T_overlapped and eta_overlap for a load skew of the ranks."""
        one_way = cluster.exchange_us(self.rows_bytes, ranks) * skew
        compute, start = self.compute_us * skew, self.route_us + self.count_exchange_us
        # The chunks share the bandwidth; each has a message's fixed part.
        one_chunk = cluster.exchange_us(self.rows_bytes / chunks, ranks) * skew
        done, link_free = start, start + one_chunk
        next_arrival = link_free
        for i in range(chunks):
            arrived = next_arrival
            if i + 1 < chunks:  # sent before the chunk that is computed goes back
                link_free = next_arrival = link_free + one_chunk
            done = max(done, arrived) + compute / chunks
            link_free = max(link_free, done) + one_chunk
        overhead = self.chunking_us + chunks * self.per_chunk_us if chunks > 1 else 0.0
        overlapped, blocking = max(link_free, done) + overhead, start + 2 * one_way + compute
        least = min(2 * one_way, self.route_us + compute)
        return {
            "T_comm": 2 * one_way,
            "T_seq": blocking,
            "T_overlapped": overlapped,
            "eta_overlap": (blocking - overlapped) / least if least else 0.0,
        }


def fit_link(points: Iterable[tuple[float, float]]) -> Link:
    """A link of measured (bytes, us)."""
    measured = list(points)
    if len({sent for sent, _ in measured}) < 2:
        raise ValueError("bench.scale: the link record must hold at least two message sizes, got fewer")
    latency, us_per_byte = _line((sent, us, us) for sent, us in measured)
    if us_per_byte <= 0:
        raise ValueError("bench.scale: larger messages must take longer, got a link record in which they do not")
    return Link(latency, 1e-3 / us_per_byte)


def fit_layers(record: dict[str, Any], link: Link) -> dict[str, Layer]:
    """One layer per router from a record of `bench ep` on ranks that one link joins."""
    settings, cases, ranks = record["settings"], record["cases"], record["link"]["ranks"]
    size = {"fp16": 2, "bf16": 2, "fp32": 4}[settings["dtype"]]
    rows_bytes = float(settings["tokens"] * settings["top_k"] * settings["d_model"] * size)
    node = Cluster(ranks, link, link)
    layers = {}
    for router in dict.fromkeys(case["router"] for case in cases):
        own = [case for case in cases if case["router"] == router]
        # What does not depend on the chunks was measured with each number of them.
        of = {key: mean(case[key] for case in own) for key in MEASURED}
        skew = of["rank_max_over_mean"]
        route = of["T_logit"] + of["T_select"] + of["T_pack"]
        compute = max(0.0, of["T_comp"] - route) / skew
        counts = max(0.0, of["T_seq"] - of["T_comp"] - of["T_comm"])
        layer = Layer(router, rows_bytes, route, counts, compute, 0.0, 0.0, skew)
        overhead = [
            (n, us - layer.predict(node, ranks, n, skew)["T_overlapped"], us)
            for n, us in ((case["chunks"], case["T_overlapped"]) for case in own)
            if n > 1
        ]
        fixed, per_chunk = _line(overhead)
        layers[router] = replace(layer, chunking_us=fixed, per_chunk_us=per_chunk)
    return layers


def check(record: dict[str, Any], layers: dict[str, Layer], cluster: Cluster) -> list[dict[str, Any]]:
    """Each measured case of a record, with its number of ranks and its skew, and what the model predicts for it."""
    ranks, rows = record["link"]["ranks"], []
    for case in record["cases"]:
        predicted = layers[case["router"]].predict(cluster, ranks, case["chunks"], case["rank_max_over_mean"])
        rows += [
            {
                "ranks": ranks,
                "router": case["router"],
                "chunks": case["chunks"],
                "what": what,
                "measured_us": case[what],
                "predicted_us": predicted[what],
                "error": predicted[what] / case[what] - 1,
                "spread": {"measured_us": Spread.from_record(case["spread"][what])} if "spread" in case else {},
            }
            for what in ("T_seq", "T_overlapped")
        ]
    return rows


def _line(points: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """`fixed` and `each`, neither below 0, of y = fixed + each * x: least squares over (x, y, the whole time).

    Where all have the same x, all of y counts as `each`.
    """
    given = list(points)
    if not given:
        return 0.0, 0.0
    rows = [(1 / whole, x / whole, y / whole) for x, y, whole in given]
    ww, wx, xx = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    wy, xy = (sum(row[i] * row[2] for row in rows) for i in (0, 1))
    if len({x for x, _, _ in given}) > 1:
        determinant = ww * xx - wx * wx
        fixed, each = (wy * xx - xy * wx) / determinant, (xy * ww - wy * wx) / determinant
        if fixed >= 0 and each >= 0:
            return fixed, each
    either = (0.0, max(0.0, xy / xx)), (max(0.0, wy / ww), 0.0)
    return min(either, key=lambda line: sum((y - line[0] * w - line[1] * x) ** 2 for w, x, y in rows))


def _results(path: str, name: str, flag: str | None = None) -> Any:
    flag = flag or name
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench.scale: --{flag} must be a readable record, got {path} ({error})") from error
    if record.get("name") != name:
        raise ValueError(f"bench.scale: --{flag} must be a record of bench {name}, got one of {record.get('name')!r}")
    return current_names(record["results"])


def _check_same_layer(fitted: dict[str, Any], other: dict[str, Any]) -> None:
    """The model keeps tokens and experts of a rank: a record of another layer cannot be compared."""

    def layer(record: dict[str, Any]) -> dict[str, Any]:
        settings = record["settings"]
        each = {"experts per rank": settings["num_experts"] // record["link"]["ranks"]}
        names = ("tokens", "d_model", "mlp_hidden_dim", "top_k", "dtype", "backward")
        return {name: settings[name] for name in names} | each

    for (name, value), own in zip(layer(other).items(), layer(fitted).values(), strict=True):
        if value != own:
            raise ValueError(f"bench.scale: --held_out must be of the layer of --ep, {name} {own}, got {value}")
    unknown = {case["router"] for case in other["cases"]} - {case["router"] for case in fitted["cases"]}
    if unknown:
        raise ValueError(f"bench.scale: --held_out must be of the routers of --ep, got {', '.join(sorted(unknown))}")


def _best(layers: dict[str, Layer], cluster: Cluster, ranks: int, skew: float, chunks: list[int]) -> dict[str, Any]:
    """The fastest router and number of chunks. Sinkhorn balances: its skew is what it was measured to be."""
    predictions = []
    for layer in layers.values():
        own_skew = min(skew, layer.rank_skew) if layer.router == "sinkhorn" else skew
        for n in chunks:
            predicted = layer.predict(cluster, ranks, n, own_skew)
            predictions.append({"ranks": ranks, "skew": skew, "router": layer.router, "chunks": n, **predicted})
    return min(predictions, key=lambda row: row["T_overlapped"])


def _check_table(rows: list[dict[str, Any]], against: str) -> Table:
    clear = [row for row in rows if all(spread.doubt is None for spread in row["spread"].values())]
    wrong = [row for row in clear if abs(row["error"]) > AGREES]
    verdict = f"{len(wrong)} of {len(clear)} are over {AGREES:.0%} off" if wrong else f"all within {AGREES:.0%}"
    if len(clear) < len(rows):
        verdict = f"{len(rows) - len(clear)} of {len(rows)} are {TOO_NOISY}" + (f", {verdict}" if clear else "")
    table = Table(title=f"the model and {against}: {verdict}", title_justify="left")
    for column in ("ranks", "router", "chunks", "", "measured us", "model us", "off"):
        table.add_column(column, justify="right" if column not in ("router", "") else "left")
    for row in rows:
        measured = with_spread(f"{row['measured_us']:,.0f}", row["spread"].get("measured_us"))
        figures = measured, f"{row['predicted_us']:,.0f}", f"{row['error']:+.1%}"
        table.add_row(str(row["ranks"]), row["router"], str(row["chunks"]), row["what"], *figures)
    return table


def _best_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="fastest, by the model", title_justify="left")
    for column in ("skew", "ranks", "router", "chunks", "T_comm us", "T_seq us", "T_overlapped us", "eta_overlap"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for row in rows:
        times = (f"{row[key]:,.0f}" for key in ("T_comm", "T_seq", "T_overlapped"))
        head = f"{row['skew']:g}", str(row["ranks"]), row["router"], str(row["chunks"])
        table.add_row(*head, *times, f"{row['eta_overlap']:z.2f}")
    return table


def main(arguments: list[str]) -> None:
    """Parse flags, fit, check, predict, print, record, draw."""
    parser = Parser("scale", __doc__)
    parser.add_argument("--ep", required=True, metavar="FILE", help="a record of bench ep, forward")
    parser.add_argument("--link", required=True, metavar="FILE", help="a record of bench link on the same machine")
    parser.add_argument(
        "--held_out", nargs="+", default=[], metavar="FILE", help="such records of other ranks, to check"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--node", type=int, default=8, help="ranks that the measured link joins")
    parser.add_argument("--network_gb_per_s", type=float, default=50.0, help="per rank, between nodes")
    parser.add_argument("--netcompute_us", type=float, default=15.0, help="fixed part of an exchange between nodes")
    parser.add_argument("--skew", type=float, nargs="+", default=[1.0, 2.0], help="max/mean of the ranks' load")
    parser.add_argument("--chunks", type=int, nargs="+", help="to choose from, by default those measured")
    parser.add_record()
    parser.add_plot()
    flags = parser.parse_args(arguments)
    for name, low in (("ranks", 2), ("chunks", 1)):
        for value in getattr(flags, name) or []:
            check_int("bench.scale", name, value, low)
    check_int("bench.scale", "node", flags.node, 1)
    for value in flags.skew:
        if not value >= 1:
            raise ValueError(f"bench.scale: skew is max/mean, at least 1, got skew={value}")
    check_positive("bench.scale", "network_gb_per_s", flags.network_gb_per_s)
    ep, link_record = _results(flags.ep, "ep"), _results(flags.link, "link")
    if ep["settings"]["backward"]:
        raise ValueError("bench.scale: the model is of a layer forward, got --ep with backward; record it without")
    held_out = [_results(path, "ep", "held_out") for path in flags.held_out]
    for other in held_out:
        _check_same_layer(ep, other)
    link = fit_link((row["bytes"], row["us"]) for row in link_record["rows"] if row["way"] == "all_to_all")
    layers = fit_layers(ep, link)
    flags.chunks = flags.chunks or sorted({case["chunks"] for case in ep["cases"]})
    cluster = Cluster(flags.node, link, Link(flags.netcompute_us, flags.network_gb_per_s))
    console = Console(width=120)
    console.print(f"link: {link_record['kind']}, {link.latency_us:,.1f} us + {link.gb_per_s:,.1f} GB/s")
    checks = check(ep, layers, Cluster(ep["link"]["ranks"], link, link))
    console.print(_check_table(checks, "the records it was fitted to"))
    unseen = [row for other in held_out for row in check(other, layers, cluster)]
    if unseen:
        console.print(_check_table(unseen, "held-out records"))
    best = [_best(layers, cluster, ranks, skew, flags.chunks) for skew in flags.skew for ranks in flags.ranks]
    console.print(_best_table(best))
    if flags.json:
        write_record(flags.json, "scale", {"settings": vars(flags), "checks": checks, "held_out": unseen, "best": best})
    if flags.plot:
        from moe_lightning.bench import plots

        plots.save(plots.scale(best, checks + unseen), flags.plot)
