"""The layout of TensorBoard's Custom Scalars tab, as an event file holds it."""

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


def layout_of(folder):
    """{category: {chart: [regular expressions]}}."""
    [event] = EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def without_a_tag(layout, tags):
    """Regular expressions that match no tag, as TensorBoard matches them."""
    expressions = [e for charts in layout.values() for chart in charts.values() for e in chart]
    return [e for e in expressions if not any(re.match(e, tag) for tag in tags)]
