"""A cost model of an expert-parallel layer: fitted to a few ranks, asked about more with as many experts each.

Legend: W ranks, n chunks, N slots of a rank, D d_model. Times in microseconds, of the slowest rank.

A layer is: route, tell the counts, then a pipeline of two resources. The link carries n chunks there, in turn, and each
chunk back when it is done; the experts do each chunk, with its share of the rows that stay, when it is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any


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
    chunk_us: float
    """What each of several chunks costs by itself."""
    rank_skew: float
    """Load of the fullest rank over the mean, as measured."""

    def predict(self, cluster: Cluster, ranks: int, chunks: int, skew: float) -> dict[str, float]:
        """T_comm, T_seq, T_overlapped and eta_overlap for a load skew of the ranks."""
        one_way = cluster.exchange_us(self.rows_bytes, ranks) * skew
        work, start = self.work_us * skew, self.route_us + self.told_us
        chunk_work = work / chunks + (self.chunk_us if chunks > 1 else 0.0)
        # Bandwidth is shared out over the chunks, a message's fixed part is paid by each.
        one_chunk = cluster.exchange_us(self.rows_bytes / chunks, ranks) * skew
        done, link_free = start, start + one_chunk
        next_there = link_free
        for i in range(chunks):
            there = next_there
            if i + 1 < chunks:  # sent before the chunk that is worked on goes back
                link_free = next_there = link_free + one_chunk
            done = max(done, there) + chunk_work
            link_free = max(link_free, done) + one_chunk
        overlapped, blocking = max(link_free, done), start + 2 * one_way + work
        least = min(2 * one_way, self.route_us + work)
        return {
            "T_comm": 2 * one_way,
            "T_seq": blocking,
            "T_overlapped": overlapped,
            "eta_overlap": (blocking - overlapped) / least if least else 0.0,
        }


def fit_link(points: Iterable[tuple[float, float]]) -> Link:
    """Least squares of relative errors over (bytes, us): us = latency + bytes / bandwidth."""
    measured = list(points)
    if len({sent for sent, _ in measured}) < 2:
        raise ValueError("bench.scale: the link record must hold at least two message sizes, got fewer")
    weighted = [(1 / us, sent / us) for sent, us in measured]
    aa, ab, bb = (sum(p[i] * p[j] for p in weighted) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(p[i] for p in weighted) for i in (0, 1))
    determinant = aa * bb - ab * ab
    latency, us_per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if us_per_byte <= 0:
        raise ValueError("bench.scale: larger messages must take longer, got a link record in which they do not")
    return Link(max(0.0, latency), 1e-3 / us_per_byte)


def fit_layers(record: dict[str, Any], link: Link) -> dict[str, Layer]:
    """One layer a strategy from a record of `bench ep` on ranks that one link joins."""
    settings, cases, ranks = record["settings"], record["cases"], record["link"]["ranks"]
    size = {"fp16": 2, "bf16": 2, "fp32": 4}[settings["dtype"]]
    rows_bytes = float(settings["tokens"] * settings["top_k"] * settings["d_model"] * size)
    node = Cluster(ranks, link, link)
    layers = {}
    for strategy in dict.fromkeys(case["strategy"] for case in cases):
        own = [case for case in cases if case["strategy"] == strategy]
        first = own[0]
        skew = first["rank_max_over_mean"]
        route = first["T_logit"] + first["T_select"] + first["T_pack"]
        work = max(0.0, first["T_comp"] - route) / skew
        told = max(0.0, first["T_seq"] - first["T_comp"] - first["T_comm"])
        layer = Layer(strategy, rows_bytes, route, told, work, 0.0, skew)
        extra = [
            (case["T_overlapped"] - layer.predict(node, ranks, case["chunks"], skew)["T_overlapped"]) / case["chunks"]
            for case in own
            if case["chunks"] > 1
        ]
        layers[strategy] = replace(layer, chunk_us=max(0.0, mean(extra)) if extra else 0.0)
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
            }
            for what in ("T_seq", "T_overlapped")
        ]
    return rows
