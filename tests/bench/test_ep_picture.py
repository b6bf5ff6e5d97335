"""The picture of bench ep: one scale for all records, the figure of what is off it, no point that was not measured."""

import json
from pathlib import Path

import pytest

from moe_lightning.bench.plots import LEAST_ETA, overlap
from moe_lightning.utils.provenance import current_names

RECORDS = Path(__file__).parents[2] / "docs/benchmarks"


def eta_panel(cases):
    settled = {"T_seq": 10.0, "T_overlapped": 9.0, "T_comm": 4.0}
    return overlap([settled | case for case in cases], [], {"kind": "NVLink", "gb_per_s": 229.0}, "title").axes[1]


def case(router, chunks, eta):
    return {"router": router, "chunks": chunks, "eta_overlap": eta}


def test_a_figure_off_the_scale_is_written_at_its_edge():
    axes = eta_panel(
        [case("naive_topk", 2, 0.4), case("naive_topk", 4, -1.5), case("naive_topk", 8, -6.2), case("sinkhorn", 8, -5)]
    )
    assert axes.get_ylim()[0] == LEAST_ETA == -1.0
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        ("-1.50", (4, -1.0)),
        ("-6.20", (8, -1.0)),
        ("-5.00", (8, -1.0)),
    ]
    heights = [text.xyann[1] for text in axes.texts[1:]]
    assert heights[1] - heights[0] >= axes.texts[1].get_fontsize()  # one over the other
    assert "cut off below -1" in axes.get_ylabel()
    triangles = [line for line in axes.lines if line.get_marker() == "v" and list(line.get_ydata()) == [-1.0]]
    assert [line.get_xdata()[0] for line in triangles] == [4, 8, 8]


@pytest.mark.parametrize(("best", "top"), [(0.7, 1.1), (1.133, 1.133)])
def test_records_share_a_scale_that_holds_all_that_is_gained(best, top):
    axes = eta_panel([case("naive_topk", 2, best), case("naive_topk", 4, 0.1)])
    assert axes.get_ylim()[0] == -1.0
    assert axes.get_ylim()[1] >= top
    assert list(axes.texts) == []
    assert axes.get_ylabel() == "eta_overlap"


def test_a_figure_that_was_not_measured_is_no_point():
    axes = eta_panel([case("naive_topk", 1, None), case("naive_topk", 2, 0.5)])
    [line] = [line for line in axes.lines if line.get_label() == "naive_topk"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2], [0.5])


@pytest.mark.parametrize("record", ["ep_nvlink_h200", "ep_through_host_h200"])
def test_every_figure_of_a_record_is_a_point_or_is_written(record):
    found = current_names(json.loads((RECORDS / f"{record}.json").read_text())["results"])["cases"]
    axes = overlap(found, [], {"kind": "", "gb_per_s": 1.0}, "").axes[1]
    low, high = axes.get_ylim()
    below = sorted(f"{case['eta_overlap']:.2f}" for case in found if not low <= case["eta_overlap"] <= high)
    assert sorted(text.get_text() for text in axes.texts) == below
