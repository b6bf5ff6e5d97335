"""The Custom Scalars tab groups tags that are really logged."""

import pytest
from event_layout import layout_of, without_a_tag
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_fit import fit, tiny_model

from moe_lightning.callbacks import ExpertLoadMonitor, RouterTiming, TensorBoardLayout, Throughput
from moe_lightning.training.modules import MLPModule


@pytest.fixture
def fitted(tmp_path):
    """`fitted(callbacks, model)`: layout and scalar tags of a run."""

    def run(callbacks, model=None):
        logger = TensorBoardLogger(tmp_path)
        fit([TensorBoardLayout(), *callbacks], model, batches=4, validation=2, logger=logger)
        return layout_of(logger.log_dir), EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]

    return run


def test_every_expression_has_a_tag(fitted):
    callbacks = [ExpertLoadMonitor(), RouterTiming(every_n_batches=1), Throughput(peak_flops=1e9)]
    layout, tags = fitted(callbacks)
    assert list(layout) == ["loss", "router time", "load", "throughput"]  # no exchange on one rank
    assert without_a_tag(layout, tags) == []
    assert without_a_tag({"x": {"y": ["router_time/T_rout$"]}}, tags)  # the check bites


def test_what_is_off_has_no_category(fitted):
    layout, tags = fitted([ExpertLoadMonitor(enabled=False), RouterTiming(every_n_batches=1)])
    assert list(layout) == ["loss", "router time"]
    assert without_a_tag(layout, tags) == []


def test_a_dense_model_has_its_loss(fitted):
    layout, tags = fitted([RouterTiming()], MLPModule(64, 16))
    assert list(layout) == ["loss"]
    assert without_a_tag(layout, tags) == []


def test_other_loggers_are_left_alone():
    steps, _, _ = fit([TensorBoardLayout()], tiny_model(), batches=1)
    assert not any("custom_scalars" in name for metrics in steps.values() for name in metrics)
