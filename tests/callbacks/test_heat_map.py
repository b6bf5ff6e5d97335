"""The same load has the same colour in every run, whatever else is in the picture; what is off the scale shows it."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moe_lightning.callbacks.expert_load import heat_map

MEAN = 100


def cell_colours(counts):
    """RGB of each cell's centre (layers, experts) in the drawn picture, and the colour bar's axes."""
    figure = heat_map(torch.tensor(counts))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    axes, bar = figure.axes
    layers, experts = len(counts), len(counts[0])
    places = [axes.transData.transform((e, layer)) for layer in range(layers) for e in range(experts)]
    colours = [tuple(int(v) for v in pixels[int(len(pixels) - y), int(x)][:3]) for x, y in places]
    return np.array(colours, dtype=object).reshape(layers, experts, 3).tolist(), bar


def test_the_same_load_has_the_same_colour_in_runs_of_different_maxima():
    even, _ = cell_colours([[150, 50, 100, 100]])
    skewed, _ = cell_colours([[150, 390, 50, 10, 0, 0]])  # the same mean, another maximum and another size
    assert even[0][0] == skewed[0][0]
    assert even[0][1] == skewed[0][2]
    assert len({tuple(colour) for colour in even[0]}) == 3


def test_load_over_the_mean_counts_and_not_the_number_of_tokens():
    few, _ = cell_colours([[3, 1, 2, 2]])
    many, _ = cell_colours([[3000, 1000, 2000, 2000]])
    assert few == many


@pytest.mark.parametrize(("within", "off"), [(400, 401), (26, 24)])
def test_a_load_off_the_scale_has_a_colour_that_the_scale_has_not(within, off):
    rest = [800 - within, *[0] * 6]
    at_end, _ = cell_colours([[within, *rest]])
    beyond, _ = cell_colours([[off, 800 - off, *[0] * 6]])
    assert at_end[0][0] != beyond[0][0]
    assert beyond[0][0] in ([255, 212, 0], [16, 16, 16])


def test_an_idle_expert_and_a_layer_without_tokens():
    colours, _ = cell_colours([[400, 0, 0, 0], [0, 0, 0, 0]])
    assert colours[0] == [colours[0][0], [16, 16, 16], [16, 16, 16], [16, 16, 16]]
    assert colours[1] == [[154, 154, 154]] * 4


def test_the_scale_is_named_and_has_the_mean_in_its_middle():
    _, bar = cell_colours([[1, 2, 3, 4]])
    assert bar.get_ylabel() == "load / mean load, log2 scale"
    assert bar.get_ylim() == pytest.approx((0.25, 4.0))
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.25", "0.5", "1", "2", "4"]
    middle, _ = cell_colours([[MEAN] * 4])
    assert max(middle[0][0]) - min(middle[0][0]) <= 2  # neither red nor blue
