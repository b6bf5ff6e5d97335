"""Ranges that cut autograd's records are moved to the records' bounds, all others stay."""

import pytest

from moe_lightning.callbacks.trace import nest

NODE = "autograd::engine::evaluate_function: MmBackward0"


def slice_(name, ts, dur, tid=1, cat="user_annotation"):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat}


NODES = [slice_(NODE, ts, 10, cat="cpu_op") for ts in (100, 120, 140)]


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (103, 145, (100, 140)),  # both bounds within a node
        (103, 135, (100, 135)),
        (115, 125, (115, 120)),
        (103, 125, (100, 120)),
        (90, 160, (90, 160)),  # holds whole nodes
        (102, 108, (102, 108)),  # within one
        (100, 120, (100, 120)),  # on the bounds
        (110, 115, (110, 115)),  # between two
    ],
)
def test_bounds(begin, end, expected):
    event = slice_("moe/L0/gate/backward", begin, end - begin)
    nest([*NODES, event], "moe/")
    assert (event["ts"], event["ts"] + event["dur"]) == expected


def test_only_ranges_of_the_prefix_on_the_thread_of_the_nodes():
    others = [
        slice_("moe/L0/gate", 103, 42, tid=2),
        slice_("ProfilerStep#1", 103, 42),
        slice_("moe/L0/gate", 103, 42, cat="gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    before = [dict(event) for event in others]
    nest([*NODES, *others], "moe/")
    assert others == before
