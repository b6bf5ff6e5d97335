"""An optimizer step without a trainer does what `fit` does, to the bit."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from moe_lightning.training.modules import DecoderMoEModule
from moe_lightning.training.optimizer import OptimizerConfig, build_optimizer, build_schedule
from moe_lightning.training.optimizer_step import OptimizerStep

STEPS, CLIP = 5, 0.05
CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=2)


def build():
    torch.manual_seed(0)
    return DecoderMoEModule(32, 16, 2, 2, 24, 4, 2, optimizer=CONFIG, compile=False)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (3, 9), generator=generator) for _ in range(count)]


def trained_by_fit(accelerator, precision, accumulate):
    module = build()
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(STEPS * accumulate), batch_size=None))
    return module.cpu().network.state_dict()


def trained_by_steps(device, precision, accumulate, **options):
    module = build().to(device)
    optimizer = build_optimizer(module.network, CONFIG)
    schedule = build_schedule(optimizer, CONFIG, STEPS)
    step = OptimizerStep(module, optimizer, precision, accumulate, CLIP, schedule=schedule, **options)
    text = [batch.to(device) for batch in batches(STEPS * accumulate)]
    losses = [step(text[i : i + accumulate]) for i in range(0, len(text), accumulate)]
    step.close()
    assert all(p.grad is None for p in module.parameters())
    assert all(len(of_step) == accumulate for of_step in losses)
    return module.cpu().network.state_dict()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 1), ("32-true", 3), ("bf16-mixed", 3)])
def test_weights_are_those_of_fit(precision, accumulate):
    by_steps = trained_by_steps("cpu", precision, accumulate)
    assert_equal(by_steps, trained_by_fit("cpu", precision, accumulate))
    untrained = build().network.state_dict()
    assert not any(torch.equal(value, untrained[name]) for name, value in by_steps.items())


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_fit_on_a_gpu(accumulate):
    by_fit = trained_by_fit("gpu", "bf16-mixed", accumulate)
    assert_equal(trained_by_steps("cuda", "bf16-mixed", accumulate), by_fit)
    assert_equal(trained_by_steps("cuda", "bf16-mixed", accumulate, cuda_graph=True), by_fit)


def test_the_gradient_is_clipped():
    module = build()
    step = OptimizerStep(module, torch.optim.SGD(module.network.parameters(), lr=0.0), "32-true", clip_norm=CLIP)
    step(batches(1))
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.network.parameters()])
    assert norm.item() == pytest.approx(CLIP, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "16-mixed"}, "optimizer_step: precision must be one of bf16-mixed, 32-true, got '16-mixed'"),
        ({"clip_norm": 0.0}, "optimizer_step: clip_norm must be positive"),
        ({"cuda_graph": True}, "optimizer_step: cuda_graph must be False without a GPU, got .*device=cpu"),
    ],
)
def test_bad_arguments(options, said):
    module = build()
    optimizer = build_optimizer(module.network, CONFIG)
    with pytest.raises(ValueError, match=said):
        OptimizerStep(module, optimizer, **({"precision": "32-true"} | options))
