"""Figures in the log equal a recount from the batches; the heat map is a picture in TensorBoard."""

import io
import statistics

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tiny_fit import BATCH, EXPERTS, LAYERS, SEQ_LEN, TOP_K, fit, tiny_model

from moe_lightning.callbacks import ExpertLoadMonitor, RouterTiming, Throughput
from moe_lightning.callbacks.expert_load import COUNTS_TAG
from moe_lightning.routers import NaiveTopK
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.training.modules import DecoderMoEModule


@pytest.fixture
def counted(monkeypatch):
    """Loads of every batch, [(stage, LAYERS lists of EXPERTS counts)], counted here from the ids."""
    seen = []

    def recording(stage, real):
        def step(self, *args):
            outputs = []
            hook = self.network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            try:
                return real(self, *args)
            finally:
                hook.remove()
                ids = [routing.selection.expert_ids_TK for routing in outputs[0].routings]
                seen.append((stage, [[int((layer == e).sum()) for e in range(EXPERTS)] for layer in ids]))

        return step

    for stage in ("training", "validation"):
        name = f"{stage}_step"
        monkeypatch.setattr(LanguageModule, name, recording(stage, getattr(LanguageModule, name)))
    return seen


def figures(batches):
    """max/mean, CV, dead and dropped of each layer, in plain Python."""
    result = []
    for layer in range(LAYERS):
        load = [sum(batch[layer][e] for batch in batches) for e in range(EXPERTS)]
        mean = sum(load) / EXPERTS
        dropped = 1 - sum(load) / (len(batches) * BATCH * SEQ_LEN * TOP_K)
        result.append((max(load) / mean, statistics.pstdev(load) / mean, load.count(0), dropped))
    return result


def check(metrics, prefix, batches):
    layers = figures(batches)
    for column, (name, total) in enumerate(
        {
            "max_over_mean": statistics.fmean,
            "cv": statistics.fmean,
            "dead_experts": sum,
            "dropped": statistics.fmean,
        }.items()
    ):
        expected = total([layer[column] for layer in layers])
        assert metrics[f"{prefix}/{name}"] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    return layers


@pytest.mark.parametrize("accumulated", [1, 2])
def test_figures_are_a_recount(counted, accumulated):
    steps, _, _ = fit([ExpertLoadMonitor()], batches=8, log_every_n_steps=2, accumulate_grad_batches=accumulated)
    logged = [metrics for metrics in steps.values() if "expert_load/cv" in metrics]
    batches = [load for _, load in counted]
    each = 2 * accumulated
    assert len(logged) == 8 // each
    for i, metrics in enumerate(logged):
        layers = check(metrics, "expert_load", batches[i * each : (i + 1) * each])
        for layer in range(LAYERS):
            assert metrics[f"expert_load_layer/L{layer}/max_over_mean"] == pytest.approx(layers[layer][0], rel=1e-5)
            assert metrics[f"expert_load_layer/L{layer}/cv"] == pytest.approx(layers[layer][1], rel=1e-5, abs=1e-6)


def test_validation_is_counted_apart_and_the_sanity_check_not(counted):
    monitor = ExpertLoadMonitor()
    steps, _, _ = fit([monitor], batches=2, validation=3, num_sanity_val_steps=2)
    training = [load for stage, load in counted if stage == "training"]
    validation = [load for stage, load in counted if stage == "validation"]
    assert len(validation) == 2 + 3
    logged = [metrics for metrics in steps.values() if "expert_load_val/cv" in metrics]
    assert len(logged) == 1
    check(logged[0], "expert_load_val", validation[2:])
    run = monitor.run_load().counts_LE.tolist()
    assert run == [[sum(b[layer][e] for b in training) for e in range(EXPERTS)] for layer in range(LAYERS)]


def test_capacity_and_dead_experts_show(counted):
    def narrow(d_model, num_experts, top_k):
        return NaiveTopK(d_model, num_experts, top_k, skew_experts=2, skew_bias=50.0, capacity_factor=1.0)

    steps, _, _ = fit([ExpertLoadMonitor()], tiny_model(router=narrow), batches=1)
    (metrics,) = steps.values()
    assert metrics["expert_load/dead_experts"] == LAYERS * 2
    assert metrics["expert_load/dropped"] == 0.5
    assert metrics["expert_load/max_over_mean"] == 2.0
    assert metrics["expert_load/cv"] == 1.0


def test_a_model_with_one_layer(counted):
    monitor = ExpertLoadMonitor()
    model = DecoderMoEModule(64, 16, 2, 1, 16, EXPERTS, TOP_K)
    steps, _, _ = fit([monitor], model, batches=1, validation=1)
    load = torch.tensor(counted[0][1][0]).float()
    metrics = {name: value for step in steps.values() for name, value in step.items()}
    assert metrics["expert_load_layer/L0/max_over_mean"] == pytest.approx(float(load.max() / load.mean()))
    assert metrics["expert_load/max_over_mean"] == pytest.approx(float(load.max() / load.mean()))
    assert monitor.run_load().counts_LE.shape == (1, EXPERTS)


def test_off_logs_nothing():
    monitor = ExpertLoadMonitor(enabled=False)
    steps, _, _ = fit([monitor], batches=2, validation=1)
    assert not any(name.startswith("expert_load") for metrics in steps.values() for name in metrics)
    assert monitor.run_load() is None


def test_per_layer_can_be_left_out():
    steps, _, _ = fit([ExpertLoadMonitor(per_layer=False)], batches=1)
    assert not any(name.startswith("expert_load_layer") for metrics in steps.values() for name in metrics)


def test_tensorboard_has_every_tag_and_the_pictures(tmp_path):
    callbacks = [
        ExpertLoadMonitor(image_every_n_steps=3),
        RouterTiming(every_n_batches=1, layers_every_n_steps=1),
        Throughput(peak_flops=1e9),
    ]
    model = tiny_model(router=lambda *sizes: NaiveTopK(*sizes, skew_experts=2, skew_bias=50.0))
    logger = TensorBoardLogger(tmp_path)
    fit(callbacks, model, batches=8, validation=2, logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={IMAGES: 0}).Reload()
    tags = set(events.Tags()["scalars"])
    names = ["T_logit", "T_select", "T_index", "T_permute", "T_pack", "T_route", "T_experts", "T_unpack"]
    expected = {
        f"expert_load{stage}/{name}"
        for stage in ("", "_val")
        for name in ("max_over_mean", "cv", "dead_experts", "dropped")
    }
    expected |= {f"expert_load_layer/L{layer}/{name}" for layer in range(LAYERS) for name in ("max_over_mean", "cv")}
    expected |= {f"{group}/{name}_ms" for group in ("router_time/forward", "router_time_val") for name in names}
    expected |= {f"router_time/backward/{name}_ms" for name in names if name not in ("T_index", "T_permute")}
    expected |= {f"router_time_layer/L{i}/forward/{name}_ms" for i in range(LAYERS) for name in names}
    expected |= {
        f"router_time_layer/L{i}/backward/{name}_ms"
        for i in range(LAYERS)
        for name in ("T_logit", "T_select", "T_pack")
    }
    expected |= {"router_time/step_ms", "router_time/T_route_share", "throughput/tokens_per_s", "throughput/mfu"}
    expected |= {"train/loss", "train/balance_loss", "train/z_loss", "val/loss", "val/perplexity"}
    assert expected - tags == set()

    counts = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(COUNTS_TAG)]
    assert [step for step, _ in counts] == list(range(8))
    assert all((counts_LE.sum(1) == BATCH * SEQ_LEN * TOP_K).all() for _, counts_LE in counts)
    assert all((counts_LE[:, 2:] == 0).all() for _, counts_LE in counts)  # skewed to two experts

    images = events.Images("expert_load/heat_map")
    assert [image.step for image in images] == [0, 3, 6]  # steps as Lightning counts them, from 0
    picture = torch.tensor(list(Image.open(io.BytesIO(images[0].encoded_image_string)).convert("RGB").getdata()))
    colours = set(map(tuple, picture.tolist()))
    assert (16, 16, 16) in colours  # off the scale's low end, an idle expert ...
    assert (243, 152, 121) in colours  # ... and one of twice the mean


@pytest.mark.parametrize("every", [-1, -100])
def test_negative_interval_is_refused(every):
    with pytest.raises(ValueError, match=f"^expert_load: image_every_n_steps .*got image_every_n_steps={every}$"):
        ExpertLoadMonitor(image_every_n_steps=every)
