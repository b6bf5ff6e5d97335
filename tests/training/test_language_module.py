"""The losses that a run trains on and shows, against hand computation."""

import copy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))

from tiny_fit import Batches, fit, tiny_model

from moe_lightning.training.modules import DecoderMoEModule
from moe_lightning.training.optimizer import OptimizerConfig


class Windows(L.Callback):
    """The model as each optimizer step finds it, its micro-batches, and the gradient that it makes of them."""

    def __init__(self):
        self.windows = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.windows.append({"module": copy.deepcopy(module).train(), "batches": []})
        self.windows[-1]["batches"].append(batch)

    def on_train_batch_end(self, trainer, module, *_):
        self.windows[-1]["gradient"] = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def losses(module, batch):
    """Cross-entropy of the next token, and what the routers add."""
    output = module.network(batch[:, :-1])
    loss = F.cross_entropy(output.logits_BSV.flatten(0, 1), batch[:, 1:].flatten())
    return {"loss": loss, **module.auxiliary_losses(output)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("accumulated", "batches", "limit", "sizes"),
    [(1, 2, 1.0, [1, 1]), (4, 8, 1.0, [4, 4]), (4, 5, 1.0, [4, 1]), (4, 8, 6, [4, 2]), (3, 2, 1.0, [2])],
    ids=str,
)
def test_a_gradient_is_the_mean_over_the_micro_batches_that_are_there(accumulated, batches, limit, sizes, precision):
    seen = Windows()
    model = tiny_model(optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0))
    options = {"accumulate_grad_batches": accumulated, "limit_train_batches": limit, "precision": precision}
    steps, _, _ = fit([seen], model, batches=batches, **options)
    assert [len(window["batches"]) for window in seen.windows] == sizes
    shown = [metrics for metrics in steps.values() if "train/loss" in metrics]
    assert len(shown) == len(sizes)
    rel, of_largest = (1e-4, 1e-6) if precision == "32-true" else (0.05, 0.02)
    for window, metrics in zip(seen.windows, shown, strict=True):
        module = window["module"]
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            each = [losses(module, batch) for batch in window["batches"]]
        (sum(sum(named.values()) for named in each) / len(each)).backward()
        for name, parameter in module.named_parameters():
            expected = parameter.grad
            if expected is not None:
                close = {"rtol": rel, "atol": of_largest * float(expected.abs().max())}
                torch.testing.assert_close(
                    window["gradient"][name], expected, **close, msg=lambda text, n=name: n + text
                )
        for name in ("loss", "balance_loss", "z_loss"):
            mean = sum(float(named[name].detach()) for named in each) / len(each)
            assert metrics[f"train/{name}"] == pytest.approx(mean, rel=1e-5 if precision == "32-true" else 1e-2), name


def test_the_progress_bar_shows_the_same_loss(monkeypatch):
    shown = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if "train/loss" in trainer.progress_bar_metrics:
                shown.append(trainer.progress_bar_metrics["train/loss"])

    steps, trainer, _ = fit([Look()], batches=9, accumulate_grad_batches=3)
    logged = [metrics["train/loss"] for metrics in steps.values() if "train/loss" in metrics]
    assert shown == [logged[0]] * 3 + [logged[1]] * 3
    assert trainer.progress_bar_metrics["train/loss"] == logged[2]


@pytest.mark.parametrize("router", ["fused_select", "sinkhorn"])
def test_validation_loss_is_one_value_whatever_the_batch_size(router):
    from moe_lightning.routers import ROUTERS

    torch.manual_seed(0)
    model = DecoderMoEModule(64, 16, 2, 2, 16, 4, 2, router=ROUTERS[router])
    [tokens] = Batches(1, batch=13, seed=3)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    with torch.no_grad():
        logits = model.eval().network(tokens[:, :-1]).logits_BSV
    expected = float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    for size in (1, 4, 7, 13):
        batches = Batches(0)
        batches.batches = [*tokens.split(size), tokens[:0]]  # the last as of a rank for which nothing is left
        for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
            [metrics] = run(model, batches, verbose=False)
            assert metrics[f"{stage}/loss"] == pytest.approx(expected, rel=1e-5), size
            assert metrics[f"{stage}/perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)
