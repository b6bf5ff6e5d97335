"""Axes hold their values, and charts their proportions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.report.charts import (
    MOST_POINTS,
    MOST_RATIOS,
    Series,
    axis,
    bar,
    binary,
    heat_map,
    longest_shown,
    number,
    plot,
    short,
)
from moe_lightning.report.events import Load
from moe_lightning.report.figures import colours

positive = st.floats(1e-6, 1e9)


@given(st.lists(positive, min_size=1), st.booleans(), st.booleans())
def test_an_axis_holds_its_values(values, log, tight):
    x = axis("x", values, log=log, tight=tight)
    assert all(-0.01 <= x.percent(value) <= 100.01 for value in values)
    assert all(-0.01 <= at <= 100.01 for at, _ in x.ticks)
    assert len(x.ticks) <= 20
    assert tight or len(x.ticks) >= 2


def test_ticks_are_round():
    assert [text for _, text in axis("", [1.46, 5.78]).ticks] == ["1", "2", "3", "4", "5", "6"]
    assert [text for _, text in axis("", [1.46, 5.78], log=True).ticks] == ["1", "1.5", "2", "3", "4", "5", "7"]
    assert [text for _, text in axis("", [0.2, 4000], log=True).ticks] == ["0.1", "1", "10", "100", "1,000", "10,000"]
    marks = axis("chunks", [1, 2, 4], log=True, marks=[1, 2, 4], tight=True).ticks
    assert marks == ((0.0, "1"), (50.0, "2"), (100.0, "4"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.01234), "0.0123"),
        (number(12345.6), "12,346"),
        (number(-2.286), "\N{MINUS SIGN}2.29"),
        (number(0), "0"),
        (number(None), "\N{EN DASH}"),
        (number(float("nan")), "NaN"),
        (number(float("-inf")), "\N{MINUS SIGN}\N{INFINITY}"),
        (short(3_495_040), "3.5 M"),
        (short(2048), "2,048"),
        (binary(268435456), "256 MiB"),
        (binary(512), "512 B"),
    ],
)
def test_numbers_as_they_are_read(text, expected):
    assert text == expected


def test_a_bar_is_its_parts():
    row = bar("r", [("T_logit", "logit", 1.0), ("T_select", "select", 3.0), ("T_index", "index", 0.0)], 8.0, "ms", 2.0)
    assert [(part.name, part.width) for part in row.segments] == [("T_logit", 12.5), ("T_select", 37.5)]
    assert (row.text, row.bound, row.cut) == ("4.00", 25.0, False)
    assert row.segments[1].tip == "T_select: 3.00 ms"


def test_a_bar_too_long_is_cut_and_says_its_length():
    assert longest_shown([10, 20, 600]) == 20
    assert longest_shown([10, 20, 600], [45, 580]) == 45
    assert longest_shown([0, 3]) == 3
    row = bar("r", [("a", "c0", 15.0), ("b", "c1", 585.0)], 20, "ms", 30)
    assert [part.width for part in row.segments] == [75.0, 25.0]
    assert (row.text, row.cut, row.bound) == ("600, roofline 30.0", True, None)


def test_a_point_below_the_scale_is_written_and_lines_end_with_their_figures():
    series = [Series("a", "c0", [1, 2, 4], [0.5, -2.5, -6.2], "solid points"), Series("b", "c1", [1, 2], [0.9, -1.5])]
    drawn = plot("eta", axis("chunks", [1, 2, 4], tight=True), axis("", [0.9, -6.2, 1], least=-1.0), series)
    assert (drawn.y.low, drawn.y.high) == (-1.0, 1.0)
    assert [(text, colour) for _, _, text, colour in drawn.off_scale] == [
        ("\N{DOWNWARDS ARROW}\N{MINUS SIGN}2.50", "c0")
    ]
    assert [text for _, text, _ in drawn.ends] == [
        "\N{DOWNWARDS ARROW}\N{MINUS SIGN}1.50",
        "\N{DOWNWARDS ARROW}\N{MINUS SIGN}6.20",
    ]
    assert [place for place, *_ in drawn.ends] == [0.0, 6.5]
    assert drawn.lines[0].dots == [(0.0, 75.0)]  # no point that looks like -1
    assert drawn.lines[0].tips[1][3] == "\N{MINUS SIGN}2.50"


def test_points_of_several_lines_below_the_scale_are_written_over_each_other():
    series = [Series(name, name, [1, 2], [-3.0 - i, 0.0], "points") for i, name in enumerate(("c0", "c1", "c2"))]
    drawn = plot("eta", axis("", [1, 2]), axis("", [-5, 1], least=-1.0), series)
    assert len({x for x, *_ in drawn.off_scale}) == 1
    assert [height for _, height, _, _ in drawn.off_scale] == [0.0, 6.5, 13.0]


def test_lines_are_thinned_to_means_and_end_where_they_end():
    xs = list(range(10_000))
    ys = [float(i % 2) for i in range(9_999)] + [7.0]
    [line] = plot("t", axis("step", xs), axis("", ys), [Series("s", "c0", xs, ys)]).lines
    assert len(line.tips) <= MOST_POINTS + 1
    assert line.end == "7.00"
    assert 0.4 < float(line.tips[5][3]) < 0.6


def test_labels_at_the_ends_do_not_overlap():
    series = [Series(str(i), f"c{i}", [0, 1], [5.0, 1.0 + i / 1000]) for i in range(6)]
    drawn = plot("t", axis("", [0, 1]), axis("", [1, 5]), series)
    heights = [height for height, _, _ in drawn.ends]
    assert all(b - a >= 6 for a, b in itertools.pairwise(heights))
    assert [colour for _, _, colour in drawn.ends] == [f"c{i}" for i in range(6)]


def test_a_heat_map_is_load_over_the_mean_of_its_layer():
    loads = [Load(3, np.array([[1, 3], [2, 2]])), Load(9, np.array([[0, 8], [30, 10]]))]
    drawn = heat_map("r", "c0", loads)
    assert (drawn.layers, drawn.experts, drawn.steps) == (2, 2, [3, 9])
    assert drawn.ratios == [[50, 150, 100, 100], [0, 200, 150, 50]]
    assert drawn.cells == [("below", 1.0), ("hot", 0.5), ("hot", 0.29), ("cold", 0.5)]


def test_the_same_load_has_the_same_colour_in_runs_of_different_maxima():
    even = heat_map("a", "c0", [Load(1, np.array([[150, 50, 100, 100]]))])
    skewed = heat_map("b", "c0", [Load(1, np.array([[150, 430, 10, 10, 0, 0]]))])
    assert even.cells[0] == skewed.cells[0] == ("hot", 0.29)
    assert [kind for kind, _ in skewed.cells] == ["hot", "above", "below", "below", "below", "below"]
    at_the_ends = heat_map("c", "c0", [Load(1, np.array([[400, 25, 100, 100, 100, 75, 0, 0]]))])
    assert at_the_ends.cells[:2] == [("hot", 1.0), ("cold", 1.0)]


def test_a_long_run_keeps_its_first_and_last_map():
    drawn = heat_map("r", "c0", [Load(i, np.ones((16, 64), dtype=np.int64)) for i in range(500)])
    assert len(drawn.steps) * 16 * 64 <= MOST_RATIOS
    assert (drawn.steps[0], drawn.steps[-1]) == (0, 499)


def test_a_router_has_one_colour_everywhere():
    alone = colours(["sinkhorn"])["sinkhorn"]
    assert colours(["mine", "sinkhorn", "naive_topk"])["sinkhorn"] == alone
    both = colours(["sinkhorn a/version_0", "sinkhorn b/version_0", "mine"])
    assert both["sinkhorn a/version_0"] == alone
    assert len(set(both.values())) == 3
