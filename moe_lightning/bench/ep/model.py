"""A cost model of an expert-parallel layer: fitted to a few ranks, asked about more with as many experts each.

Legend: W ranks, n chunks, N slots of a rank, D d_model. Times in microseconds, of the slowest rank.

A layer is: route, tell the counts, then a pipeline of two resources. The link carries n chunks there, in turn, and each
chunk back when it is done; the experts do each chunk, with its share of the rows that stay, when it is there. Being cut
in chunks then costs something once and something for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from moe_lightning.bench.spread import Spread

MEASURED = ("T_logit", "T_select", "T_pack", "T_comm", "T_comp", "T_seq", "rank_max_over_mean")


@dataclass(frozen=True)
class Link:
    """What a message costs: a fixed part, and its bytes over the bandwidth."""

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
    """One strategy, as fitted: what does not depend on the number of ranks."""

    strategy: str
    rows_bytes: float
    """Of N rows of D."""
    route_us: float
    told_us: float
    """Until the ranks know each other's counts."""
    work_us: float
    """Experts and unpacking of N rows, at balance."""
    cut_us: float
    """What being cut in chunks costs, once."""
    chunk_us: float
    """What each chunk then costs by itself."""
    rank_skew: float
    """Load of the fullest rank over the mean, as measured."""

    def predict(self, cluster: Cluster, ranks: int, chunks: int, skew: float) -> dict[str, float]:
        """T_comm, T_seq, T_overlapped and eta_overlap for a load skew of the ranks."""
        one_way = cluster.exchange_us(self.rows_bytes, ranks) * skew
        work, start = self.work_us * skew, self.route_us + self.told_us
        # Bandwidth is shared out over the chunks, a message's fixed part is paid by each.
        one_chunk = cluster.exchange_us(self.rows_bytes / chunks, ranks) * skew
        done, link_free = start, start + one_chunk
        next_there = link_free
        for i in range(chunks):
            there = next_there
            if i + 1 < chunks:  # sent before the chunk that is worked on goes back
                link_free = next_there = link_free + one_chunk
            done = max(done, there) + work / chunks
            link_free = max(link_free, done) + one_chunk
        cut = self.cut_us + chunks * self.chunk_us if chunks > 1 else 0.0
        overlapped, blocking = max(link_free, done) + cut, start + 2 * one_way + work
        least = min(2 * one_way, self.route_us + work)
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
    """One layer a strategy from a record of `bench ep` on ranks that one link joins."""
    settings, cases, ranks = record["settings"], record["cases"], record["link"]["ranks"]
    size = {"fp16": 2, "bf16": 2, "fp32": 4}[settings["dtype"]]
    rows_bytes = float(settings["tokens"] * settings["top_k"] * settings["d_model"] * size)
    node = Cluster(ranks, link, link)
    layers = {}
    for strategy in dict.fromkeys(case["strategy"] for case in cases):
        own = [case for case in cases if case["strategy"] == strategy]
        # What does not depend on the chunks was measured with each number of them.
        of = {key: mean(case[key] for case in own) for key in MEASURED}
        skew = of["rank_max_over_mean"]
        route = of["T_logit"] + of["T_select"] + of["T_pack"]
        work = max(0.0, of["T_comp"] - route) / skew
        told = max(0.0, of["T_seq"] - of["T_comp"] - of["T_comm"])
        layer = Layer(strategy, rows_bytes, route, told, work, 0.0, 0.0, skew)
        beyond = [
            (n, us - layer.predict(node, ranks, n, skew)["T_overlapped"], us)
            for n, us in ((case["chunks"], case["T_overlapped"]) for case in own)
            if n > 1
        ]
        cut, chunk = _line(beyond)
        layers[strategy] = replace(layer, cut_us=cut, chunk_us=chunk)
    return layers


def check(record: dict[str, Any], layers: dict[str, Layer], cluster: Cluster) -> list[dict[str, Any]]:
    """Each measured case of a record, with its number of ranks and its skew, beside what the model says of it."""
    ranks, rows = record["link"]["ranks"], []
    for case in record["cases"]:
        predicted = layers[case["strategy"]].predict(cluster, ranks, case["chunks"], case["rank_max_over_mean"])
        rows += [
            {
                "ranks": ranks,
                "strategy": case["strategy"],
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
    """`fixed` and `each`, neither below 0, of y = fixed + each * x: least squares over (x, y, what y is a part of).

    Where all have the same x, `each` is taken for all of it.
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
